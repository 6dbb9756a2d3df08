"""One sequence in its grammar: core.grammar.Grammar over an llguidance matcher. Masks are computed on a thread of their own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError

from llguidance import LLMatcher

from apportion.core.errors import InvalidRequest
from apportion.serving.structured.sandbox import reason


class MatcherGrammar:
    """matcher: its own, nobody else's. mask: the first one. threads: compute the next ones; llguidance lets go of the GIL meanwhile."""

    def __init__(self, matcher: LLMatcher, mask: bytes, threads: ThreadPoolExecutor) -> None:
        self._matcher, self._threads = matcher, threads
        self._mask: bytes | None = mask
        self._coming: Future[bytes] | None = None
        self.is_finished = False

    def accept(self, token: int) -> None:
        self._check(self._matcher.consume_token(token))
        self.is_finished = self._matcher.is_stopped()
        if not self.is_finished:
            self._mask = None
            self._coming = self._threads.submit(self._matcher.compute_bitmask)

    def mask(self, timeout_s: float) -> bytes | None:
        if self._mask is None and self._coming is not None:
            try:
                self._mask = self._coming.result(timeout_s)
            except TimeoutError:
                return None
            self._check(not self._matcher.is_error())
        return self._mask

    def _check(self, fine: bool) -> None:
        if not fine:
            raise InvalidRequest(f"the grammar of the request could not be followed further: {reason(self._matcher.get_error())}")
