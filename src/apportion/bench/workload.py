"""What a serving benchmark sends: prompts and output lengths, from a distribution, a trace, or a file of real prompts.

Everything is drawn from seeds before the run, so the same flags send the same bytes to every server. Knows no tokenizer: a prompt
is token ids (exact lengths; the completions endpoint takes them) or words of about a token each, and the server's own count of
prompt tokens is what the results state.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apportion.bench.traces import HASH_BLOCK, TraceEntry
from apportion.core.errors import InvalidParameter

FIRST_TOKEN = 260  # the ids below are special or single bytes in most vocabularies: a model would answer them with broken characters
# Common enough to be one token, with the space before it, in nearly every vocabulary.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father power hour game line end member law car "
    "city community name president team minute idea kid body information back parent face others level office door health person art "
    "war history party result change morning reason research girl guy moment air teacher force education"
).split()


@dataclass(frozen=True, slots=True)
class Sample:
    """One request to send. prompt_len: tokens asked for; an output_len of None leaves the end to the model."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int | None


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Makes prompts of a length from a seed. vocab_size None: words, otherwise token ids below it."""

    vocab_size: int | None
    seed: int = 0

    def prompt(self, name: object, length: int) -> str | list[int]:
        return self.join([(name, length)])

    def join(self, pieces: list[tuple[object, int]]) -> str | list[int]:
        """(name, length) pieces, one after the other: pieces of one name begin alike, so equal beginnings are equal tokens."""
        if self.vocab_size is None:
            return " ".join(word for piece in pieces for word in self._draw(*piece, WORDS))
        ids = range(min(FIRST_TOKEN, self.vocab_size // 2), self.vocab_size)
        return [token for piece in pieces for token in self._draw(*piece, ids)]

    def _draw(self, name: object, length: int, choices: Any) -> list[Any]:
        return random.Random(f"{self.seed}/{name}").choices(choices, k=length)


def random_samples(
    maker: PromptMaker, num: int, *, input_len: int, output_len: int, range_ratio: float = 0.0, prefix_len: int = 0
) -> list[Sample]:
    """Lengths are even draws from [len * (1 - r), len * (1 + r)], as in `bench throughput`; all prompts begin with prefix_len equal tokens.

    Errors: InvalidParameter.
    """
    if not 0 <= range_ratio < 1:
        raise InvalidParameter(f"random_range_ratio must be at least 0 and below 1, got {range_ratio}")
    if min(input_len, output_len) < 1 or prefix_len < 0:
        raise InvalidParameter(f"lengths must be at least 1, got input {input_len}, output {output_len}, prefix {prefix_len}")
    numbers = random.Random(f"{maker.seed}/lengths")

    def draw(length: int) -> int:
        return max(1, numbers.randint(round(length * (1 - range_ratio)), round(length * (1 + range_ratio))))

    samples = []
    for i in range(num):
        length, output = draw(input_len), draw(output_len)
        samples.append(Sample(maker.join([("prefix", prefix_len), (i, length)]), prefix_len + length, output))
    return samples


@dataclass(frozen=True, slots=True)
class TraceSamples:
    """samples and their times (seconds from the trace's start), and how many entries were longer than the limit and left out."""

    samples: list[Sample] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    num_too_long: int = 0


def trace_samples(maker: PromptMaker, entries: list[TraceEntry], *, length_scale: float = 1.0, max_len: int | None = None) -> TraceSamples:
    """Prompts for a trace. Equal hashes give equal tokens, so a prefix cache finds what it would have found.

    length_scale shrinks prompts, outputs and the blocks that hashes stand for alike: shares of equal tokens stay. An entry whose
    prompt and output together exceed max_len afterwards is left out and counted. Errors: InvalidParameter.
    """
    if not 0 < length_scale <= 1:
        raise InvalidParameter(f"length_scale must be above 0 and at most 1, got {length_scale}")
    found, too_long = TraceSamples(), 0
    for number, entry in enumerate(entries):
        pieces = list(_pieces(entry, number, length_scale))
        input_len, output_len = sum(length for _, length in pieces), max(1, round(entry.output_len * length_scale))
        if max_len is not None and input_len + output_len > max_len:
            too_long += 1
            continue
        found.samples.append(Sample(maker.join(pieces), input_len, output_len))
        found.times.append(entry.time)
    if not found.samples:
        raise InvalidParameter(f"no request of the trace fits max_model_len {max_len}; a smaller length_scale shrinks them")
    return TraceSamples(found.samples, found.times, too_long)


def _pieces(entry: TraceEntry, number: int, scale: float) -> Iterator[tuple[object, int]]:
    """(name, length) of the blocks of a prompt; a prompt without hashes is one block of its own."""
    length = max(1, round(entry.input_len * scale))
    block = max(1, round(HASH_BLOCK * scale))
    for hash_id in entry.hash_ids:
        if length > 0:
            yield ("block", hash_id), min(block, length)
            length -= block
    if length > 0:
        yield ("request", number), length


def file_samples(path: Path, num: int, *, prompt_field: str = "prompt", output_len: int | None = None) -> list[Sample]:
    """The first `num` prompts of a JSON-lines file, from the start again where it has fewer. A line's "output_tokens" goes before
    output_len, as in vLLM's custom datasets. Errors: InvalidParameter that names the line."""
    if not path.is_file():
        raise InvalidParameter(f"there is no file of prompts {path}")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
            prompt = row[prompt_field]
            prompt = prompt[0] if isinstance(prompt, list) else prompt  # the first turn of a conversation
            if not isinstance(prompt, str):
                raise ValueError(f"{prompt_field} is no text")
            samples.append(Sample(prompt, len(prompt.split()), row.get("output_tokens", output_len)))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise InvalidParameter(f"{path}, line {number}: {type(error).__name__}: {error}") from None
    if not samples:
        raise InvalidParameter(f"{path} holds no prompt")
    return [samples[i % len(samples)] for i in range(num)]
