"""Llama 3.1 and later: the answer is a call, {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>; several are parted by ;"""

from __future__ import annotations

from apportion.serving.tool_parsers.machine import BLANKS, CallMachine, Steps

TAG = "<|python_tag|>"


class Llama3Parser(CallMachine):
    """An object is a call only where it names a tool at hand: without a mark before it, it may as well be the answer itself."""

    def run(self) -> Steps:
        opening = ""
        while (char := (yield from self.next())) and char in BLANKS:
            opening += char
        if char == TAG[0]:
            self.put_back(char)
            came, text = yield from self.take(TAG)
            if not came:
                self.content(opening + text)
                yield from self.rest()
                return
            opening += TAG
            while (char := (yield from self.next())) and char in BLANKS:
                opening += char
        while char == "{" and (yield from self.try_call(self.object_call(known_only=True), opening + "{")):
            opening, char = "", (yield from self.skip_blanks())
            if char and char in ";,":
                char = yield from self.skip_blanks()
        else:
            if char != "{":
                self.content(opening + char)
        yield from self.rest()
