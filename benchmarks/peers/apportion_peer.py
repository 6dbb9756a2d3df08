"""Ours, in the same process shape as the peers."""

from __future__ import annotations

import argparse

from protocol import Timing, claim_stdout, serve

import apportion
from apportion.bench.latency import time_batch


def main() -> None:
    answers = claim_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype", default="bfloat16", help="bfloat16, float32, float16, or what to quantize to: w4a16,lm_head=w8a16+kv=fp8"
    )
    args = parser.parse_args()
    weights, _, cache = args.dtype.partition("+kv=")
    plain = weights in ("bfloat16", "float32", "float16")
    llm = apportion.LLM(
        args.model,
        dtype=weights if plain else "bfloat16",
        quantization=None if plain else weights,
        kv_cache_dtype=cache or "auto",
        num_threads=args.threads,
        max_model_len=9216,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        kv_cache_memory=1 << 30,
    )

    def generate(prompts: list[list[int]], output_len: int) -> Timing:
        timing = time_batch(llm, prompts, output_len)
        return Timing(timing.prefill_s, timing.decode_s, timing.token_ids)

    serve(answers, {"engine": "apportion", "version": apportion.__version__, "dtype": args.dtype, "note": ""}, generate)


if __name__ == "__main__":
    main()
