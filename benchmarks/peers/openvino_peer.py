"""OpenVINO: the model exported once by optimum-intel to a stateful graph, run by the OpenVINO runtime step by step.

int8: every matrix in int8 of one scale and zero point an output, the embedding too. int4: linears in symmetric int4 of groups of 128, the
output projection and the embedding as under int8. NNCF's own rounding, without data; the runtime rounds inputs of both to int8 in groups.

The output projection is cut to the last position of each sequence, as OpenVINO's own generation pipelines do.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from protocol import Timing, claim_stdout, serve

QUANTIZED = {"int8": {"bits": 8, "sym": False}, "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0}}


def export(folder: Path, target: Path, dtype: str) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    how = {"load_in_8bit": False}
    if dtype in QUANTIZED:
        how = {"quantization_config": OVWeightQuantizationConfig(**QUANTIZED[dtype])}
    OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, **how).save_pretrained(target)


def keep_last_position(model: ov.Model) -> None:
    """Slice the input of the matrix product that makes the logits to [:, -1:, :]."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    minus_one, end, step, axis = (ops.constant([value], ov.Type.i64) for value in (-1, np.iinfo(np.int64).max, 1, 1))
    node.input(0).replace_source_output(ops.slice(node.input_value(0), minus_one, end, step, axis).output(0))
    model.validate_nodes_and_infer_types()


def main() -> None:
    answers = claim_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("auto", "f32", "bf16", "f16", *QUANTIZED), default="auto", help="of products, or of weights")
    args = parser.parse_args()
    quantized = args.dtype in QUANTIZED
    config = hashlib.blake2b((args.model / "config.json").read_bytes(), digest_size=4).hexdigest()
    target = Path(sys.prefix) / "exported" / f"{args.model.name}-{config}-{args.dtype if quantized else 'float'}"
    if not (target / "openvino_model.xml").exists():
        export(args.model, target, args.dtype)
    core = ov.Core()
    model = core.read_model(target / "openvino_model.xml")
    keep_last_position(model)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": args.threads, "NUM_STREAMS": 1}
    if args.dtype != "auto" and not quantized:
        settings["INFERENCE_PRECISION_HINT"] = args.dtype
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    wants_positions = any("position_ids" in port.get_names() for port in compiled.inputs)

    def generate(prompts: list[list[int]], output_len: int) -> Timing:
        request.reset_state()
        start = time.perf_counter()
        tokens = step(np.array(prompts, np.int64), 0)
        first = time.perf_counter()
        outputs = [tokens]
        for i in range(output_len - 1):
            tokens = step(tokens, len(prompts[0]) + i)
            outputs.append(tokens)
        return Timing(first - start, time.perf_counter() - first, np.concatenate(outputs, 1).tolist())

    def step(token_ids: np.ndarray, num_computed: int) -> np.ndarray:
        batch, count = token_ids.shape
        inputs = {
            "input_ids": token_ids,
            "attention_mask": np.ones((batch, num_computed + count), np.int64),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        if wants_positions:
            inputs["position_ids"] = np.tile(np.arange(num_computed, num_computed + count), (batch, 1))
        logits = request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]
        return logits[:, -1].argmax(-1)[:, None]

    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    about = {"engine": "OpenVINO", "version": ov.__version__, "dtype": precision}
    serve(answers, about | {"note": f"IR weights {args.dtype if quantized else 'f16 or bf16'}"}, generate)


if __name__ == "__main__":
    main()
