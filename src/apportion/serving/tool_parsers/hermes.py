"""Hermes 2 and later, Qwen 2.5 and 3, and many more: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as often as needed."""

from __future__ import annotations

from apportion.serving.tool_parsers.machine import CallMachine, Malformed, Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(CallMachine):
    def run(self) -> Steps:
        while True:
            came, blanks = yield from self.content_around_calls(OPEN)
            if not came:
                return
            before = self.num_calls
            if (yield from self.try_call(self._call(), blanks + OPEN)):
                yield from self._close()
            elif self.num_calls > before:  # told in part: what follows is no content either
                yield from self.until(CLOSE, lambda text: None)

    def _call(self) -> Steps:
        if (yield from self.skip_blanks()) != "{":
            raise Malformed
        yield from self.object_call()

    def _close(self) -> Steps:
        """The end of a call; a model that forgets it goes on with content."""
        char = yield from self.skip_blanks()
        self.put_back(char)
        came, text = yield from self.take(CLOSE)
        if not came:
            self.content(text)
