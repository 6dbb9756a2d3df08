"""Quantizing while loading: which formats come of it, and that memory never holds more than the quantized model and one layer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from apportion.core.errors import CheckpointError, InvalidParameter
from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.reference.number_formats import dequantize, quantize
from apportion.quant.checkpoint import online
from tests.unit.models.conftest import dense_logits
from tests.unit.quant import packers
from tests.unit.quant.test_checkpoints import TOKENS, load, loaded_weights

FORMATS = {"fp8": "e4m3_channel", "fp8_block": "e4m3_b128x128", "int8": "int8_channel", "w8a16": "int8_channel", "w4a16": "int4_g128"}


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
def test_linears_are_rounded_and_nothing_else(tmp_path, quantization, mixture):
    tensors = packers.floats(mixture)
    folder = packers.write(tmp_path, tensors, mixture=mixture)
    quantized = load(folder, quantization=quantization)
    found = loaded_weights(quantized.model)
    for name in packers.linears(mixture):
        expected = dequantize(quantize(tensors[f"{name}.weight"], NumberFormat.parse(FORMATS[quantization])))
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7, msg=name)
    if mixture:
        assert torch.equal(found["model.layers.0.mlp.gate"], tensors["model.layers.0.mlp.gate.weight"])
    plain = load(folder)
    assert quantized.manifest["nbytes"] < plain.manifest["nbytes"]
    if not mixture:  # there a rounding may send a token to another expert
        near = torch.nn.functional.cosine_similarity(dense_logits(quantized.model, TOKENS), dense_logits(plain.model, TOKENS))
        assert near.mean() > (0.88 if quantization == "w4a16" else 0.98)


def test_refusals(tmp_path):
    tensors = packers.floats()
    folder = packers.write(tmp_path / "a", tensors)
    with pytest.raises(InvalidParameter, match="quantization 'e4m3_channel@e4m3_static' needs calibration"):
        load(folder, quantization="e4m3_channel@e4m3_static")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    with pytest.raises(CheckpointError, match=r"tensor model.layers.0.mlp.up_proj.weight holds NaN or infinity"):
        load(packers.write(tmp_path / "b", tensors), quantization="fp8")


CONFIG = packers.CONFIG | {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 4,
    "vocab_size": 16384, "dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (512, 1024), "self_attn.v_proj": (512, 1024), "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (2816, 1024), "mlp.up_proj": (2816, 1024), "mlp.down_proj": (1024, 2816),
}  # fmt: skip
LAYER_BYTES = 2 * (2 * 1024 * 1024 + 2 * 512 * 1024 + 3 * 1024 * 2816)
MEASURE = """
import gc, json, re, sys, torch
torch.set_num_threads(1)
from apportion.core.config import ModelConfig
from apportion.kernels.dispatch import select_ops
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model
from apportion.platforms.platform import select_platform
from pathlib import Path

ops = select_ops(select_platform("cpu"))

def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, small = sys.argv[1], sys.argv[2]
def load(folder, quantization):
    return load_model(ModelConfig(model=folder, quantization=quantization), read_spec(Path(folder)), ops)
load(small, sys.argv[3])  # imports and first uses are not the model's
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before, without_files = memory("VmRSS"), memory("RssAnon") + memory("RssShmem")
loaded = load(folder, sys.argv[3])
gc.collect()
print(json.dumps([memory("VmHWM") - before, memory("RssAnon") + memory("RssShmem") - without_files, loaded.manifest["nbytes"]]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("peak")
    hidden = CONFIG["hidden_size"]
    vocab = CONFIG["vocab_size"]  # a table is larger than a layer
    tensors = {"model.embed_tokens.weight": torch.zeros(vocab, hidden), "lm_head.weight": torch.zeros(vocab, hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden)
    for layer in range(4):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden)
        tensors |= {f"model.layers.{layer}.{name}.weight": torch.empty(shape).uniform_(-1, 1) for name, shape in SHAPES.items()}
    small = packers.write(root / "small", packers.floats())
    folder = packers.write(root / "large", {key: tensor.bfloat16() for key, tensor in tensors.items()})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder, small


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("quantization", ["fp8", "fp8_block", "int8", "w4a16"])
def test_memory_peaks_at_the_quantized_model_and_one_layer(folders, quantization):
    """And what stays in memory is what the formats store, within 3 %."""
    folder, small = folders
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(small), quantization], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak, resident, nbytes = json.loads(done.stdout)
    tables = 2 * 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]  # in bfloat16
    share = {"w4a16": 0.3, "fp8": 0.51, "fp8_block": 0.51, "int8": 0.51}[quantization]
    assert nbytes - tables < share * ((folder / "model.safetensors").stat().st_size - tables)
    assert peak <= nbytes + LAYER_BYTES, f"{peak / 1e6:.0f} MB at the peak, {nbytes / 1e6:.0f} packed, {LAYER_BYTES / 1e6:.0f} a layer"
    fmt = Scheme.parse(online(quantization, "bfloat16").of("model.layers.0.mlp.up_proj").scheme).weight
    linears = sum(fmt.stored_bytes(*shape) for shape in SHAPES.values()) * CONFIG["num_hidden_layers"]
    stored = linears + tables
    assert abs(resident - stored) <= 0.03 * stored, f"{resident / 1e6:.1f} MB resident, {stored / 1e6:.1f} stored"
