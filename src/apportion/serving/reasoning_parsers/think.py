"""DeepSeek-R1, Qwen 3 and their kin: <think>what the model thinks</think> and then its answer."""

from __future__ import annotations

from apportion.serving.tool_parsers.machine import BLANKS, CharMachine, Steps
from apportion.serving.transforms import ReasoningDelta, TextTransform

OPEN, CLOSE = "<think>", "</think>"


class ThinkParser(CharMachine):
    """answer: what takes the text after the thought. is_open: the prompt has begun the thought already.

    Blanks around the marks are layout.
    """

    def __init__(self, answer: TextTransform, *, is_open: bool) -> None:
        self._answer, self._is_open = answer, is_open
        super().__init__()

    def run(self) -> Steps:
        if not self._is_open:
            lead = ""
            while (char := (yield from self.next())) and char in BLANKS:
                lead += char
            self.put_back(char)
            came, text = yield from self.take(OPEN)
            if not came:
                self._pass_on(lead + text)
                yield from self._rest()
                return
        blanks = None  # those at the beginning are left out

        def think(text: str) -> None:
            nonlocal blanks
            for char in text:
                if char not in BLANKS:
                    self.tell(ReasoningDelta((blanks or "") + char))
                    blanks = ""
                elif blanks is not None:
                    blanks += char

        if (yield from self.until(CLOSE, think)):
            while (char := (yield from self.next())) and char in BLANKS:
                pass
            self._pass_on(char)
            yield from self._rest()

    def _rest(self) -> Steps:
        while char := (yield from self.next()):
            self._pass_on(char)
        for delta in self._answer.finish():
            self.tell(delta)

    def _pass_on(self, text: str) -> None:
        for delta in self._answer.feed(text):
            self.tell(delta)
