"""Generated text to what a chat client is told: text, reasoning, tool calls.

The seam for tool and reasoning parsers. A stream and a whole answer go through the same transform, so they cannot differ: joined,
the deltas of any cutting of a text are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call number `index`. id and name come with its first piece; arguments are pieces of JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


TextDelta = ContentDelta | ReasoningDelta | ToolCallDelta


class TextTransform(Protocol):
    """Made for one sequence. `feed` gets its text piece by piece; `finish` once, with no text left to come."""

    def feed(self, text: str) -> list[TextDelta]: ...

    def finish(self) -> list[TextDelta]: ...


class PlainText:
    """Text is content."""

    def feed(self, text: str) -> list[TextDelta]:
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[TextDelta]:
        return []
