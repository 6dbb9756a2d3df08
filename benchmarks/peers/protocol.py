"""How compare_peers.py talks to one engine: a subprocess, one JSON object a line on stdin and stdout. Standard library only.

Engine -> first line: {"engine", "version", "dtype", "note"} once the model is loaded and warm.
Request: {"batch", "prompt_len", "output_len", "seed"} -> {"prefill_s", "decode_s", "token_ids"}.
prefill_s: from the prompts to the first token of every sequence. decode_s: from there to the last token, output_len - 1 steps.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TextIO

VOCAB = 32000


@dataclass(frozen=True)
class Timing:
    prefill_s: float
    decode_s: float
    token_ids: list[list[int]]  # per sequence, all greedy


Generate = Callable[[list[list[int]], int], Timing]


def random_prompts(batch: int, prompt_len: int, seed: int) -> list[list[int]]:
    """The same token ids for every engine; ids below 3 are special tokens."""
    numbers = random.Random(seed)
    return [[numbers.randrange(3, VOCAB) for _ in range(prompt_len)] for _ in range(batch)]


def claim_stdout() -> TextIO:
    """Called first: stdout carries answers alone, what libraries print there goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, about: dict[str, str], generate: Generate) -> None:
    """Answer requests until stdin closes."""
    generate(random_prompts(1, 32, seed=0), 8)
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = random_prompts(request["batch"], request["prompt_len"], request["seed"])
        print(json.dumps(asdict(generate(prompts, request["output_len"]))), file=answers, flush=True)
