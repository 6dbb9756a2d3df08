"""Items with a right answer: asked in one run of the engine, greedy, and counted. What is asked is other modules' business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import SamplingParams
from apportion.evaluate.likelihood import Progress
from apportion.evaluate.statistics import Estimate, wilson
from apportion.evaluate.subject import Subject, max_model_len, run_batch

ITEMS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Item:
    """One question. is_right: judges the text of an answer. row: what a report says of it (answer, length, depth, ...)."""

    task: str
    prompt: Sequence[int]
    max_tokens: int
    is_right: Callable[[str], bool]
    stop: tuple[str, ...] = ()
    row: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    item: Item
    text: str
    is_right: bool

    def as_row(self) -> dict[str, Any]:
        return {"task": self.item.task, **self.item.row, "text": self.text, "right": self.is_right}


def ask(llm: Subject, items: Sequence[Item], progress: Progress | None = None) -> list[Answer]:
    """Every item, greedy. Errors: InvalidParameter, before anything runs, for an item that the model has no room for."""
    longest = max_model_len(llm)
    for item in items:
        if len(item.prompt) + item.max_tokens > longest:
            raise InvalidParameter(
                f"{item.task} has a prompt of {len(item.prompt)} tokens and asks for {item.max_tokens}: this model takes {longest} in all"
            )
    answers: list[Answer] = []
    total = sum(len(item.prompt) for item in items)
    for first in range(0, len(items), ITEMS_AT_ONCE):
        asked = items[first : first + ITEMS_AT_ONCE]
        params = [SamplingParams(temperature=0.0, max_tokens=item.max_tokens, stop=list(item.stop)) for item in asked]
        outputs = run_batch(llm, [item.prompt for item in asked], params)
        texts = [output.outputs[0].text for output in outputs]
        answers += [Answer(item, text, item.is_right(text)) for item, text in zip(asked, texts, strict=True)]
        if progress:
            progress(sum(len(item.prompt) for item in items[: first + len(asked)]), total)
    return answers


def accuracy(answers: Sequence[Answer]) -> Estimate:
    """How many are right, with Wilson's interval."""
    return wilson(sum(answer.is_right for answer in answers), len(answers))


def by_task(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """In the order in which tasks first come."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.item.task, []).append(answer)
    return found
