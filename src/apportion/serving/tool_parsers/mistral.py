"""Mistral: [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]; since its eleventh tokenizer [TOOL_CALLS]name[ARGS]{...}, repeated."""

from __future__ import annotations

import re
import secrets
import string

from apportion.serving.tool_parsers.machine import BLANKS, CallMachine, Malformed, Steps
from apportion.serving.transforms import ToolCallDelta

TAG, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
NAME = re.compile(r"[\w.-]{1,256}")


class MistralParser(CallMachine):
    def make_id(self) -> str:
        """Its templates take ids of nine letters and digits, and no others."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def run(self) -> Steps:
        while True:
            came, blanks = yield from self.content_around_calls(TAG)
            if not came:
                return
            opening = blanks + TAG
            while (char := (yield from self.next())) and char in BLANKS:
                opening += char
            if char == "[":
                yield from self._list(opening + char)
            else:
                yield from self.try_call(self._named(char), opening + char)

    def _list(self, opening: str) -> Steps:
        while True:
            char = yield from self.skip_blanks()
            if char == "," and self.num_calls:
                continue
            if char != "{" or not (yield from self.try_call(self.object_call(), opening + char)):
                if char not in "{]":
                    self.content(opening + char)
                return
            opening = ""

    def _named(self, char: str) -> Steps:
        name = ""
        while char and char not in "[{":
            name += char
            char = yield from self.next()
        name = name.strip()
        if not NAME.fullmatch(name):
            raise Malformed
        call_id = self.make_id()
        if char == "[":
            self.put_back(char)
            mark = yield from self._mark()
            if mark == CALL_ID:
                call_id = ""
                while (char := (yield from self.next())) and char != "[":
                    call_id += char
                self.put_back(char)
                mark = yield from self._mark()
            if mark != ARGS:
                raise Malformed
            char = yield from self.skip_blanks()
        if char != "{":
            raise Malformed
        index = self.num_calls
        self.num_calls += 1
        self.tell(ToolCallDelta(index, "", call_id, name))
        yield from self.json_value(char, lambda text: self.arguments(index, text))

    def _mark(self) -> Steps:
        text = ""
        while (char := (yield from self.next())) and len(text) < len(CALL_ID):
            text += char
            if char == "]":
                break
        return text
