"""How long one batch takes, prefill and decode apart: `apportion bench latency`. Drives the face, knows nothing below it."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from apportion.core.sampling_params import SamplingParams
from apportion.llm import LLM


@dataclass(frozen=True, slots=True)
class BatchTiming:
    """prefill_s: from the call to the first token of every sequence. decode_s: from there to the last token of all."""

    prefill_s: float
    decode_s: float
    token_ids: list[list[int]]


def random_prompts(batch_size: int, input_len: int, vocab: int, seed: int) -> list[list[int]]:
    """Token ids without text; the first ids of a vocabulary are special tokens and left out."""
    numbers = random.Random(seed)
    return [[numbers.randrange(min(3, vocab - 1), vocab) for _ in range(input_len)] for _ in range(batch_size)]


def time_batch(llm: LLM, prompts: list[list[int]], output_len: int) -> BatchTiming:
    """All prompts at once, greedy, to exactly output_len tokens each."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    start = time.monotonic()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    first = max(output.metrics.first_token_time for output in outputs)
    last = max(output.metrics.last_token_time for output in outputs)
    return BatchTiming(first - start, last - first, [list(output.outputs[0].token_ids) for output in outputs])


def measure_latency(
    llm: LLM, *, vocab: int, batch_size: int, input_len: int, output_len: int, num_iters_warmup: int, num_iters: int, seed: int = 0
) -> dict[str, Any]:
    """Medians over num_iters batches, every one of fresh random prompts, so that no prefix is found in the cache."""

    def run(iteration: int) -> BatchTiming:
        return time_batch(llm, random_prompts(batch_size, input_len, vocab, seed + iteration), output_len)

    for i in range(num_iters_warmup):
        run(i)
    timings = [run(num_iters_warmup + i) for i in range(num_iters)]
    totals = [t.prefill_s + t.decode_s for t in timings]
    prefill_s = statistics.median(t.prefill_s for t in timings)
    decode_s = statistics.median(t.decode_s for t in timings)
    num_steps = output_len - 1
    return {
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "latency_s": statistics.median(totals),
        "latencies_s": totals,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": batch_size * input_len / prefill_s,
        "decode_s": decode_s,
        "step_ms": 1000 * decode_s / num_steps if num_steps else None,
        "decode_tokens_per_s": batch_size * num_steps / decode_s if num_steps else None,
    }
