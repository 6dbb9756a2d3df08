"""What one HTTP request waits for: the news of its sequences, merged until they are read.

A slow reader costs no more memory than the text it has not read: what arrives meanwhile is joined to what waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from apportion.core.outputs import SequenceDelta
from apportion.serving.messages import Finished, Generate


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One prompt on its way: when its sequences told their tokens, how many, and why they ended. Readings of time.monotonic."""

    request: Generate
    num_tokens: list[int] = field(init=False)
    last_s: list[float] = field(init=False)
    finish_reasons: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        n = self.request.params.n
        self.num_tokens, self.last_s, self.finish_reasons = [0] * n, [0.0] * n, [None] * n


class Stream:
    """The answers to `requests`. A choice is a sequence of one of them: choice i * n + j is sequence j of request i.

    opened: done once every request is accepted. num_tokens: generated so far, by choice. ends: what is known of requests that finished.
    error: what it failed with.
    """

    def __init__(self, requests: Sequence[Generate]) -> None:
        self.requests = requests
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_tokens = [0] * sum(r.params.n for r in requests)
        self.ends: dict[str, Finished] = {}
        self._first_choice = {}
        num_choices = 0
        for request in requests:
            self._first_choice[request.request_id] = num_choices
            num_choices += request.params.n
        self._unaccepted = {request.request_id for request in requests}
        self._pending: dict[int, SequenceDelta] = {}
        self.error: Exception | None = None
        self._wakeup: asyncio.Future[None] | None = None

    @property
    def num_choices(self) -> int:
        return len(self.num_tokens)

    @property
    def is_done(self) -> bool:
        """Whether nothing more will arrive."""
        return self.error is not None or len(self.ends) == len(self.requests)

    def accept(self, request_id: str) -> None:
        self._unaccepted.discard(request_id)
        if not self._unaccepted and not self.opened.done():
            self.opened.set_result(None)

    def put(self, delta: SequenceDelta) -> None:
        choice = self._first_choice[delta.request_id] + delta.index
        self.num_tokens[choice] += len(delta.token_ids)
        waiting = self._pending.get(choice)
        if waiting is None:
            self._pending[choice] = delta
        else:
            waiting.join(delta)

    def end(self, finished: Finished) -> None:
        self.ends[finished.request_id] = finished

    def fail(self, error: Exception) -> None:
        """Whoever waits gets `error`, now or when they ask."""
        if not self.is_done:
            self.error = error
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # whether or not anybody asks
        self.wake()

    def wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def get(self) -> dict[int, SequenceDelta]:
        """What is new by choice, as soon as there is anything; empty at the end. Raises what the stream failed with."""
        while not self._pending:
            if self.error is not None:
                raise self.error
            if self.is_done:
                return {}
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        pending, self._pending = self._pending, {}
        return pending

    async def collect(self) -> list[SequenceDelta]:
        """Everything, one delta a choice."""
        whole: dict[int, SequenceDelta] = {}
        while pending := await self.get():
            for choice, delta in pending.items():
                if choice in whole:
                    whole[choice].join(delta)
                else:
                    whole[choice] = delta
        return [whole[choice] for choice in sorted(whole)]
