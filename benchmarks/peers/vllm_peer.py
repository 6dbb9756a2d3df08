"""vLLM's CPU build, its engine in this process, driven step by step."""

from __future__ import annotations

import argparse
import itertools
import os
import time

from protocol import Timing, claim_stdout, serve


def main() -> None:
    answers = claim_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm

    llm = vllm.LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=32,
        enable_prefix_caching=False,
        enforce_eager=args.eager,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    ids = itertools.count()

    def generate(prompts: list[list[int]], output_len: int) -> Timing:
        params = vllm.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        names = [str(next(ids)) for _ in prompts]
        outputs: dict[str, list[int]] = {}
        start = time.perf_counter()
        first = None
        for name, prompt in zip(names, prompts, strict=True):
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                outputs[output.request_id] = list(output.outputs[0].token_ids)
            if first is None and len(outputs) == len(prompts):
                first = time.perf_counter()
        # vLLM appends a suffix of its own to request ids; they still sort as they were added.
        rows = [outputs[key] for key in sorted(outputs, key=lambda key: int(key.split("-")[0]))]
        return Timing(first - start, time.perf_counter() - first, rows)

    mode = "eager" if args.eager else "torch.compile"
    serve(answers, {"engine": "vLLM CPU", "version": vllm.__version__, "dtype": args.dtype, "note": mode}, generate)


if __name__ == "__main__":
    main()
