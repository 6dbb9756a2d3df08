"""How much a queue of requests gets through in all: `apportion bench throughput`. Lengths and tokens are random with a seed."""

from __future__ import annotations

import random
import time
from typing import Any

from apportion.bench.latency import random_prompts
from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import SamplingParams
from apportion.llm import LLM


def draw_requests(
    *, vocab: int, num_prompts: int, input_len: int, output_len: int, range_ratio: float = 0.0, seed: int = 0
) -> list[tuple[list[int], int]]:
    """Prompts as token ids, each with the number of tokens to generate. range_ratio r in [0, 1): lengths are even draws from
    [len * (1 - r), len * (1 + r)]. Errors: InvalidParameter."""
    if not 0 <= range_ratio < 1:
        raise InvalidParameter(f"range_ratio must be at least 0 and below 1, got {range_ratio}")
    numbers = random.Random(seed)

    def draw(length: int) -> int:
        return max(1, numbers.randint(round(length * (1 - range_ratio)), round(length * (1 + range_ratio))))

    prompts = [random_prompts(1, draw(input_len), vocab, numbers.randrange(2**31))[0] for _ in range(num_prompts)]
    return [(prompt, draw(output_len)) for prompt in prompts]


def measure_throughput(llm: LLM, **drawn: Any) -> dict[str, Any]:
    """All requests of `draw_requests(**drawn)` queued at once."""
    requests = draw_requests(**drawn)
    prompts, num_prompts = [prompt for prompt, _ in requests], len(requests)
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False) for _, length in requests]
    start = time.monotonic()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    elapsed_s = time.monotonic() - start
    num_input = sum(map(len, prompts))
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "num_prompts": num_prompts,
        "elapsed_s": elapsed_s,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "requests_per_s": num_prompts / elapsed_s,
        "output_tokens_per_s": num_output / elapsed_s,
        "total_tokens_per_s": (num_input + num_output) / elapsed_s,
    }
