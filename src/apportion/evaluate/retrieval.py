"""Whether a model finds what its context holds: the tasks of `tasks` over a grid of lengths and depths, held-out keys, exact answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from apportion.assets import PASSAGE
from apportion.core.errors import InvalidParameter
from apportion.evaluate.answers import Answer, Item, accuracy, ask, by_task
from apportion.evaluate.likelihood import Progress
from apportion.evaluate.report import Report
from apportion.evaluate.subject import Subject, describe, max_model_len
from apportion.evaluate.tasks import Filler, make
from apportion.evaluate.text import read_text
from apportion.processor.tokenizer import Tokenizer

TASKS = ("passkey", "multi_needle", "mqar", "variable_tracking")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_SAMPLES = 10
ROOM = 32  # tokens left for specials and the answer when lengths are chosen by what fits


def retrieval_items(
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    filler: str | None = None,
) -> list[Item]:
    """num_samples for each task, length (tokens of text and question) and depth, from test keys alone. filler: prose; None: the bundled.

    Errors: InvalidParameter for an unknown task, a depth outside 0..1, a length too short for its task.
    """
    if num_samples < 1:
        raise InvalidParameter(f"num_samples must be at least 1, got {num_samples}")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    hay = Filler(read_text(PASSAGE) if filler is None else filler, count)
    items = []
    for task in tasks:
        for length in lengths:
            for depth in depths:
                for i in range(num_samples):
                    sample = make(task, hay, length=length, depth=depth, seed=seed + i)
                    row = {"length": length, "depth": depth, "seed": seed + i, "answer": sample.answer.strip()}
                    # two tokens more than the answer: one that goes on in the same word makes it another answer
                    items.append(Item(task, tokenizer.encode(sample.prompt), count(sample.answer) + 2, sample.is_answered_by, row=row))
    return items


def lengths_that_fit(llm: Subject) -> list[int]:
    fits = [length for length in LENGTHS if length + ROOM <= max_model_len(llm)]
    if not fits:
        raise InvalidParameter(
            f"this model takes {max_model_len(llm)} tokens, and the shortest retrieval text has {LENGTHS[0]}; give lengths"
        )
    return fits


def retrieval_report(
    llm: Subject,
    *,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    filler: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Accuracy of each task, over the whole grid and in each of its cells."""
    lengths = lengths or lengths_that_fit(llm)
    grid = {"tasks": list(tasks), "lengths": list(lengths), "depths": list(depths), "num_samples": num_samples}
    items = retrieval_items(llm.tokenizer, tasks=tasks, lengths=lengths, depths=depths, num_samples=num_samples, seed=seed, filler=filler)
    started = time.monotonic()
    answers = ask(llm, items, progress)
    wall_s = time.monotonic() - started
    return Report(
        task="retrieval",
        subject=describe(llm),
        metrics={"retrieval": accuracy(answers)} | {task: accuracy(own) for task, own in by_task(answers).items()},
        cells=cells(answers),
        settings=grid | {"filler": "bundled" if filler is None else "given"},
        seeds={"items": seed},
        samples=[answer.as_row() for answer in answers],
        wall_s=wall_s,
        num_tokens=sum(len(item.prompt) for item in items),
    )


def cells(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """One row for each task, length and depth."""
    found: dict[tuple[str, int, float], list[Answer]] = {}
    for answer in answers:
        found.setdefault((answer.item.task, answer.item.row["length"], answer.item.row["depth"]), []).append(answer)
    return [{"task": task, "length": length, "depth": depth, **accuracy(own).as_dict()} for (task, length, depth), own in found.items()]
