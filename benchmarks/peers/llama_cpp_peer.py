"""llama.cpp through the low-level API of llama-cpp-python: one llama_batch holds a token of every sequence."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import llama_cpp as lib
import numpy as np
from gguf_convert import convert
from protocol import VOCAB, Timing, claim_stdout, serve

MAX_TOKENS = 2048  # of one llama_decode call: 16 prompts of 128
FILE_TYPES = {"q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0}


def quantize(source: Path, target: Path, dtype: str) -> None:
    """As llama-quantize does it: Q4_0 keeps the output projection in Q6_K."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[dtype]
    if status := lib.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit(f"llama.cpp cannot quantize {source}: {status}")


def main() -> None:
    answers = claim_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "f16", *FILE_TYPES), default="bf16")
    parser.add_argument("--flash-attn", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--ubatch", type=int, default=512)
    args = parser.parse_args()
    lib.llama_backend_init()
    path = args.model / f"model-{args.dtype}.gguf"
    if not path.exists():
        wide = "bf16" if args.dtype in FILE_TYPES else args.dtype
        source = args.model / f"model-{wide}.gguf"
        if not source.exists():
            convert(args.model, source, wide)
        if args.dtype in FILE_TYPES:
            quantize(source, path, args.dtype)
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    contexts: dict[int, object] = {}

    def context(num_sequences: int) -> object:
        """One per batch size: with kv_unified off every sequence has a cache of its own, which is how llama.cpp batches fastest."""
        if num_sequences not in contexts:
            params = lib.llama_context_default_params()
            params.n_ctx = 1024 * num_sequences
            params.n_batch, params.n_ubatch = MAX_TOKENS, args.ubatch
            params.n_seq_max = num_sequences
            params.n_threads = params.n_threads_batch = args.threads
            params.kv_unified = False
            params.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[args.flash_attn]
            params.no_perf = True
            contexts[num_sequences] = lib.llama_init_from_model(model, params)
        return contexts[num_sequences]

    batch = lib.llama_batch_init(MAX_TOKENS, 0, 1)

    def generate(prompts: list[list[int]], output_len: int) -> Timing:
        ctx = context(len(prompts))
        lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
        start = time.perf_counter()
        rows = [(sequence, position, token, position == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts) for position, token in enumerate(prompt)]  # fmt: skip
        tokens = step(ctx, rows)
        first = time.perf_counter()
        outputs = [[token] for token in tokens]
        for i in range(output_len - 1):
            tokens = step(ctx, [(s, len(prompts[s]) + i, token, True) for s, token in enumerate(tokens)])
            for output, token in zip(outputs, tokens, strict=True):
                output.append(token)
        return Timing(first - start, time.perf_counter() - first, outputs)

    def step(ctx: object, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """rows: (sequence, position, token, wants logits) -> the greedy token of each row that wants logits."""
        batch.n_tokens = len(rows)
        for i, (sequence, position, token, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, position, 1, sequence, wants
        if status := lib.llama_decode(ctx, batch):
            raise SystemExit(f"llama_decode returned {status}")
        wanted = [i for i, row in enumerate(rows) if row[3]]
        return [int(np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, i), (VOCAB,)).argmax()) for i in wanted]

    note = lib.llama_print_system_info().decode().strip()
    serve(answers, {"engine": "llama.cpp", "version": f"llama-cpp-python {lib.__version__}", "dtype": args.dtype, "note": note}, generate)


if __name__ == "__main__":
    main()
