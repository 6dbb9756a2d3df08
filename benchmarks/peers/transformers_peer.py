"""transformers without its generate(): a forward a step with a DynamicCache and argmax, which is faster on small models."""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from protocol import Timing, claim_stdout, serve


def main() -> None:
    answers = claim_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa")
    model.eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], output_len: int) -> Timing:
        cache = transformers.DynamicCache()
        start = time.perf_counter()
        tokens = step(torch.tensor(prompts), cache)
        first = time.perf_counter()
        outputs = [tokens]
        for _ in range(output_len - 1):
            tokens = step(tokens, cache)
            outputs.append(tokens)
        return Timing(first - start, time.perf_counter() - first, torch.cat(outputs, 1).tolist())

    def step(token_ids: torch.Tensor, cache: transformers.DynamicCache) -> torch.Tensor:
        return model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

    about = {"engine": "transformers", "version": transformers.__version__, "dtype": args.dtype, "note": f"torch {torch.__version__}"}
    serve(answers, about, generate)


if __name__ == "__main__":
    main()
