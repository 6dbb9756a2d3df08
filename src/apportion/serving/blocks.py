"""An answer as a row of blocks, as the newer APIs write it: thoughts, texts and tool calls, one after another.

A stream tells the steps; a whole answer shows the blocks when all steps are done. Both come from the same machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from apportion.serving.transforms import ContentDelta, ReasoningDelta, TextDelta, ToolCallDelta


@dataclass(slots=True)
class Block:
    """text: of a call, its arguments as JSON. call_id, name: of a call."""

    kind: Literal["thought", "text", "call"]
    index: int
    text: str = ""
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    block: Block


@dataclass(frozen=True, slots=True)
class Grown:
    """text: what is new; `block.text` has it already."""

    block: Block
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """is_cut: the answer ended within it, for want of tokens."""

    block: Block
    is_cut: bool


Step = Opened | Grown | Closed


class Blocks:
    """One sequence. list: the blocks so far; the last one may be open."""

    def __init__(self) -> None:
        self.list: list[Block] = []
        self._call_index = -1

    def feed(self, deltas: list[TextDelta]) -> Iterator[Step]:
        for delta in deltas:
            if not self._continues(delta):
                yield from self.close()
                self.list.append(self._begin(delta))
                yield Opened(self.list[-1])
            text = delta.arguments if isinstance(delta, ToolCallDelta) else delta.text
            if text:
                self.list[-1].text += text
                yield Grown(self.list[-1], text)

    def close(self, *, is_cut: bool = False) -> Iterator[Step]:
        """The end of the block that is open, if there is one."""
        if self.list:
            yield Closed(self.list[-1], is_cut)

    def _continues(self, delta: TextDelta) -> bool:
        kind = self.list[-1].kind if self.list else None
        match delta:
            case ContentDelta():
                return kind == "text"
            case ReasoningDelta():
                return kind == "thought"
            case ToolCallDelta(index=index):
                return kind == "call" and index == self._call_index

    def _begin(self, delta: TextDelta) -> Block:
        match delta:
            case ContentDelta():
                return Block("text", len(self.list))
            case ReasoningDelta():
                return Block("thought", len(self.list))
            case ToolCallDelta(index=index, id=call_id, name=name):
                self._call_index = index
                return Block("call", len(self.list), call_id=call_id or "", name=name or "")
