"""Questions from a file, answered greedily and compared exactly, after the usual normalization."""

from __future__ import annotations

import re
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.evaluate.answers import Item, accuracy, ask
from apportion.evaluate.likelihood import Progress
from apportion.evaluate.report import Report
from apportion.evaluate.subject import Subject, describe

TEMPLATE = "Question: {question}\nAnswer:"
SHORT, LONG = 32, 256  # tokens of an answer on one line, and of one that a pattern is looked for in


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How a question is put and its answer read.

    chat: through the chat template, as one user message; otherwise as `template` with {question}. answer_pattern: a regular expression,
    the last match of which (its first group, if it has one) is the answer, in the model's text and in the file's; None takes the first
    line. num_shots: so many entries of the file are examples with answers before each question, and are not asked. max_tokens: of an
    answer; None: 32, or 256 with a pattern.
    """

    chat: bool = False
    template: str = TEMPLATE
    answer_pattern: str | None = None
    num_shots: int = 0
    max_tokens: int | None = None

    def read(self, text: str) -> str:
        """The answer in a text; '' where the pattern is not found."""
        if self.answer_pattern is None:
            return (text.strip().splitlines() or [""])[0]
        found = list(re.finditer(self.answer_pattern, text))
        return (found[-1][1] if found[-1].re.groups else found[-1][0]) or "" if found else ""


def normalize(answer: str) -> str:
    """Lower case, without punctuation, articles and spare spaces (Rajpurkar et al., SQuAD, EMNLP 2016)."""
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def qa_items(llm: Subject, entries: Sequence[Mapping[str, Any]], protocol: Protocol) -> list[Item]:
    """One item for each entry that is not an example: {"question", "answer"}, the answer a string or a list of accepted ones.

    Errors: InvalidParameter for an entry without them, or a pattern that its answer does not hold.
    """
    try:
        re.compile(protocol.answer_pattern or "")
    except re.error as error:
        raise InvalidParameter(f"answer_pattern {protocol.answer_pattern!r} is no regular expression: {error}") from error
    if "{question}" not in protocol.template:
        raise InvalidParameter(f"the template {protocol.template!r} has no {{question}}")
    if not 0 <= protocol.num_shots < len(entries):
        raise InvalidParameter(f"num_shots is {protocol.num_shots}, and there are {len(entries)} entries: one at least must be left to ask")
    accepted = [_accepted(number, entry, protocol) for number, entry in enumerate(entries, 1)]
    shots = [(entry["question"], _first(entry["answer"])) for entry in entries[: protocol.num_shots]]
    max_tokens = protocol.max_tokens or (LONG if protocol.answer_pattern else SHORT)
    stop = () if protocol.chat or protocol.answer_pattern else ("\n",)
    items = []
    for number, (entry, right) in enumerate(zip(entries, accepted, strict=True), 1):
        if number > protocol.num_shots:
            prompt = _prompt(llm, protocol, shots, entry["question"])
            row = {"entry": number, "question": entry["question"], "answer": sorted(right)}
            items.append(Item("qa", prompt, max_tokens, lambda text, right=right: normalize(protocol.read(text)) in right, stop, row))
    return items


def _accepted(number: int, entry: Mapping[str, Any], protocol: Protocol) -> set[str]:
    answers = entry.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(entry.get("question"), str) or not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise InvalidParameter(f"entry {number} needs a 'question' and an 'answer' that is a string or a list of strings")
    right = {normalize(protocol.read(answer)) for answer in answers} - {""}
    if not right:
        raise InvalidParameter(f"entry {number} has no answer" + (" that the pattern finds" if protocol.answer_pattern else ""))
    return right


def _first(answer: str | list[str]) -> str:
    return answer if isinstance(answer, str) else answer[0]


def _prompt(llm: Subject, protocol: Protocol, shots: Sequence[tuple[str, str]], question: str) -> list[int]:
    if protocol.chat:
        turns = [turn for asked, answer in shots for turn in (("user", asked), ("assistant", answer))]
        messages = [{"role": role, "content": content} for role, content in [*turns, ("user", question)]]
        return llm.tokenizer.encode(llm.render_chat(messages, add_generation_prompt=True), add_special_tokens=False)
    examples = [f"{protocol.template.replace('{question}', asked)} {answer}\n\n" for asked, answer in shots]
    return llm.tokenizer.encode("".join(examples) + protocol.template.replace("{question}", question))


def qa_report(
    llm: Subject, entries: Sequence[Mapping[str, Any]], protocol: Protocol | None = None, *, progress: Progress | None = None
) -> Report:
    """The share of questions answered exactly."""
    protocol = protocol or Protocol()
    items = qa_items(llm, entries, protocol)
    started = time.monotonic()
    answers = ask(llm, items, progress)
    wall_s = time.monotonic() - started
    settings = {name: getattr(protocol, name) for name in protocol.__slots__} | {"max_tokens": items[0].max_tokens}
    return Report(
        task="qa",
        subject=describe(llm),
        metrics={"exact_match": accuracy(answers)},
        settings=settings,
        samples=[answer.as_row() for answer in answers],
        wall_s=wall_s,
        num_tokens=sum(len(item.prompt) for item in items),
    )
