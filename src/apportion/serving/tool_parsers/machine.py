"""Parsers that are told a text one character at a time, written as generators: how the text was cut cannot matter to them.

JSON is passed on as it was written, never parsed and written again: nothing of it is lost or closed by guess.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Generator
from typing import Any

from apportion.serving.transforms import ContentDelta, ReasoningDelta, TextDelta, ToolCallDelta

END = ""  # what a machine is sent when no text is left to come
BLANKS = " \t\r\n"

Steps = Generator[None, str, Any]
Sink = Callable[[str], None]


class Malformed(Exception):
    """What was read is no tool call."""


class CharMachine:
    """A TextTransform. Subclasses write `run`: `char = yield` is the next character, END at the end (and again after it)."""

    def __init__(self) -> None:
        self._out: list[TextDelta] = []
        self._back = ""
        self._trace: list[str] | None = None
        self._steps = self.run()
        next(self._steps)

    def run(self) -> Steps:
        raise TypeError(f"{type(self).__name__} has no run")

    def feed(self, text: str) -> list[TextDelta]:
        for char in text:
            self._steps.send(char)
        return self._take()

    def finish(self) -> list[TextDelta]:
        try:
            while True:
                self._steps.send(END)
        except StopIteration:
            return self._take()

    def _take(self) -> list[TextDelta]:
        out, self._out = self._out, []
        return out

    # -- output -----------------------------------------------------------------------------------------------------------

    def tell(self, delta: TextDelta) -> None:
        """Text that goes on is joined to what waits."""
        match self._out[-1:], delta:
            case ([ContentDelta(text)], ContentDelta(more)):
                self._out[-1] = ContentDelta(text + more)
            case ([ReasoningDelta(text)], ReasoningDelta(more)):
                self._out[-1] = ReasoningDelta(text + more)
            case ([ToolCallDelta(index, text, call_id, name)], ToolCallDelta(same, more, None)) if index == same:
                self._out[-1] = ToolCallDelta(index, text + more, call_id, name)
            case _:
                self._out.append(delta)

    def content(self, text: str) -> None:
        if text:
            self.tell(ContentDelta(text))

    def arguments(self, index: int, text: str) -> None:
        if text:
            self.tell(ToolCallDelta(index, text))

    # -- input ------------------------------------------------------------------------------------------------------------

    def next(self) -> Steps:
        """The next character; `try_call` remembers it."""
        if self._back:
            char, self._back = self._back, ""
        else:
            char = yield
        if self._trace is not None:
            self._trace.append(char)
        return char

    def put_back(self, char: str) -> None:
        self._back = char
        if self._trace:
            self._trace.pop()

    def skip_blanks(self) -> Steps:
        """The first character that is none."""
        while (char := (yield from self.next())) and char in BLANKS:
            pass
        return char

    def until(self, mark: str, sink: Sink) -> Steps:
        """Pass text to `sink` up to `mark`, which is read and not passed on. True if it came, False at the end."""
        held = ""
        while True:
            char = yield from self.next()
            if char == END:
                sink(held)
                return False
            held += char
            while held and not mark.startswith(held):
                sink(held[0])
                held = held[1:]
            if held == mark:
                return True

    def take(self, mark: str) -> Steps:
        """Read `mark`: (True if it came, what was read of it). The character that differs is left."""
        held = ""
        while held != mark:
            char = yield from self.next()
            if char == END or not mark.startswith(held + char):
                self.put_back(char)
                return False, held
            held += char
        return True, held

    def rest(self) -> Steps:
        """All that is left is content."""
        while char := (yield from self.next()):
            self.content(char)

    # -- JSON -------------------------------------------------------------------------------------------------------------

    def json_string(self, sink: Sink) -> Steps:
        """The rest of a string whose quote has been read, quotes passed on. Errors: Malformed at the end of the text."""
        sink('"')
        while (char := (yield from self.next())) != '"':
            if char == END:
                raise Malformed
            sink(char)
            if char == "\\":
                sink((yield from self.next()))
        sink('"')

    def json_value(self, first: str, sink: Sink) -> Steps:
        """A value that begins with `first`. Errors: Malformed where it is none or the text ends in it."""
        if first == '"':
            yield from self.json_string(sink)
        elif first and first in "{[":
            yield from self._json_nested(first, sink)
        elif first and first in "-0123456789tfn":
            text = first
            while (char := (yield from self.next())) and char not in BLANKS + ",]}":
                text += char
            self.put_back(char)
            _loads(text)
            sink(text)
        else:
            raise Malformed

    def _json_nested(self, first: str, sink: Sink) -> Steps:
        closers = ["}" if first == "{" else "]"]
        sink(first)
        while closers:
            char = yield from self.next()
            if char == END:
                raise Malformed
            if char == '"':
                yield from self.json_string(sink)
                continue
            if char in "{[":
                closers.append("}" if char == "{" else "]")
            elif char in "}]" and char != closers.pop():
                raise Malformed
            sink(char)


class CallMachine(CharMachine):
    """What parsers of tool calls share. names: of the tools at hand, in case a call can only be told by them."""

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        self.names = names
        self.num_calls = 0
        super().__init__()

    def make_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def object_call(self, *, known_only: bool = False) -> Steps:
        """A call written as an object with a name and arguments (or parameters), its opening brace read.

        Until the name is known nothing is told. known_only: another name than those of the tools is no call. Errors: Malformed.
        """
        index, opened, early = self.num_calls, False, ""
        while True:
            char = yield from self.skip_blanks()
            if char == "}":
                break
            key = yield from self._key(char)
            first = yield from self.skip_blanks()
            if key in ("arguments", "parameters") and first != '"' and opened:
                yield from self.json_value(first, lambda text: self.arguments(index, text))
                early = "told"
            else:
                value: list[str] = []
                yield from self.json_value(first, value.append)
                if key == "name":
                    name = _loads("".join(value))
                    if not isinstance(name, str) or opened or (known_only and name not in self.names):
                        raise Malformed
                    opened = True
                    self.num_calls += 1
                    self.tell(ToolCallDelta(index, "", self.make_id(), name))
                    self.arguments(index, early)
                elif key in ("arguments", "parameters"):
                    early = "".join(value) if first != '"' else str(_loads("".join(value)))  # some write JSON in a string
                    self.arguments(index, early if opened else "")
            char = yield from self.skip_blanks()
            if char == "}":
                break
            if char != ",":
                raise Malformed
        if not opened:
            raise Malformed
        self.arguments(index, "" if early else "{}")

    def _key(self, char: str) -> Steps:
        if char != '"':
            raise Malformed
        text: list[str] = []
        yield from self.json_string(text.append)
        if (yield from self.skip_blanks()) != ":":
            raise Malformed
        return _loads("".join(text))

    def try_call(self, call: Steps, opening: str) -> Steps:
        """Read a call. True if it was one; otherwise it is content, with what opened it, unless its name has been told."""
        before = self.num_calls
        self._trace = []
        try:
            yield from call
        except Malformed:
            if self.num_calls == before:
                self.content(opening + "".join(self._trace))
            return False
        finally:
            self._trace = None
        return True

    def content_around_calls(self, mark: str) -> Steps:
        """Content up to `mark`; blanks before it are layout. (True if it came, the blanks that were left out)."""
        blanks = ""

        def sink(text: str) -> None:
            nonlocal blanks
            for char in text:
                if char in BLANKS:
                    blanks += char
                else:
                    self.content(blanks + char)
                    blanks = ""

        came = yield from self.until(mark, sink)
        if not came and not self.num_calls:
            self.content(blanks)
        return came, blanks


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Malformed from None
