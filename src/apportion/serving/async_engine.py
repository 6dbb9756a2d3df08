"""The API process's side of the engine: hands requests over, deals news out to streams, and lives through the engine's deaths.

When the engine process dies every stream fails at once with the reason; the process is started again, up to `max_restarts` times.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any

from apportion.core import errors
from apportion.core.errors import ApportionError, InternalError, InvalidRequest
from apportion.core.outputs import SequenceDelta
from apportion.serving.engine_link import EngineLink
from apportion.serving.messages import (
    Abort,
    Accepted,
    Answer,
    CheckIntegrity,
    Deltas,
    Event,
    Finished,
    Generate,
    LastWords,
    LoadModel,
    ModelInfo,
    Models,
    Refused,
    Status,
    UnloadModel,
)  # fmt: skip
from apportion.serving.metrics import Metrics
from apportion.serving.stream import RequestRecord, Stream

logger = logging.getLogger(__name__)

HEARTBEAT_TIMEOUT_S = 5.0


class EngineDead(ApportionError):
    """The engine process died with requests waiting, or is not there. words: its own report; None while it starts."""

    def __init__(self, message: str, words: LastWords | None = None) -> None:
        super().__init__(message)
        self.words = words


class QueueFull(ApportionError):
    """More sequences wait than the server was told to let wait."""


class AsyncEngine:
    """One engine process and those who wait for it.

    make_link: starts a process. on_models: awaited with every change of a model's state, before anything else is told. on_fatal: called
    when the server cannot go on; its text says why. max_sequences: of one model that may be open at once.
    """

    def __init__(
        self,
        link: EngineLink,
        make_link: Callable[[], EngineLink],
        *,
        max_sequences: int,
        max_restarts: int,
        on_models: Callable[[list[ModelInfo]], Awaitable[None]],
        on_fatal: Callable[[str], None],
        metrics: Metrics,
    ) -> None:
        self._link, self._make_link = link, make_link
        self._max_sequences, self._max_restarts = max_sequences, max_restarts
        self._on_models, self._on_fatal = on_models, on_fatal
        self._metrics = metrics
        self._streams: dict[str, Stream] = {}
        self._records: dict[str, RequestRecord] = {}
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._call_ids = count(1)
        self._supervisor: asyncio.Task[None] | None = None
        self.is_ready = False
        self.num_deaths = 0
        self._num_open: Counter[str] = Counter()  # sequences, by model
        self.last_words: LastWords | None = None
        self.status: Status | None = None
        self.status_time = time.monotonic()
        self._handlers: dict[type, Callable[[Any], None]] = {
            Deltas: self._deal, Accepted: self._accept, Refused: self._refuse, Answer: self._answer, Status: self._take_status,
        }  # fmt: skip

    @property
    def pid(self) -> int:
        return self._link.pid

    def start(self) -> None:
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self, *, at_once: bool = False) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self.give_up()
        await asyncio.to_thread(self._link.stop, at_once=at_once)

    def give_up(self) -> None:
        """Fail everybody who still waits: the server ends."""
        self._fail_all(EngineDead("the server is shutting down"))

    def kill(self) -> None:
        """End the engine process now, unsaved."""
        self._link.process.kill()

    async def generate(self, requests: Sequence[Generate]) -> Stream:
        """Hand requests of one model over; returns once all are accepted.

        Errors: InvalidRequest for more sequences than there will ever be room for; QueueFull; EngineDead; whatever the engine refuses a
        request with.
        """
        self._require_ready()
        stream, model, limit = Stream(requests), requests[0].model, self._max_sequences
        if stream.num_choices > limit:
            raise InvalidRequest(f"the request asks for {stream.num_choices} sequences, its prompts times n, and the server takes {limit}")
        if self._num_open[model] + stream.num_choices > limit:
            raise QueueFull(f"{self._num_open[model]} sequences of {model} run or wait and the server takes {limit}; try again later")
        self._num_open[model] += stream.num_choices
        for request in requests:
            self._streams[request.request_id] = stream
            self._records[request.request_id] = RequestRecord(request)
        try:
            for request in requests:
                await self._link.send(request)
            await stream.opened
        except BaseException:
            self.abort(stream)
            raise
        return stream

    def abort(self, stream: Stream) -> None:
        """End what of a stream still runs; its blocks are free within a step. Safe to call at any time."""
        open_ids = [r.request_id for r in stream.requests if r.request_id in self._streams]
        for request_id in open_ids:
            self._close(request_id, None)
        if open_ids and self.is_ready:
            _spawn(self._link.send(Abort(open_ids)))

    async def load_model(self, name: str) -> None:
        await self._call(LoadModel(next(self._call_ids), name))

    async def unload_model(self, name: str) -> None:
        await self._call(UnloadModel(next(self._call_ids), name))

    async def check_integrity(self) -> None:
        await self._call(CheckIntegrity(next(self._call_ids)))

    def why_not_ready(self, step_timeout_s: float) -> str | None:
        """None when the engine answers and either is idle or stepped recently; otherwise what is wrong."""
        if not self.is_ready:
            return "the engine is starting" if self.last_words is None else f"the engine died and is starting again: {self.last_words}"
        silent = time.monotonic() - self.status_time
        if silent > HEARTBEAT_TIMEOUT_S:
            return f"the engine has not answered for {silent:.1f} s"
        if self.status is not None and self.status.busy and self.status.since_step_s > step_timeout_s:
            return f"the engine is busy and has finished no step for {self.status.since_step_s:.1f} s"
        return None

    def _require_ready(self) -> None:
        if not self.is_ready:
            raise EngineDead(self.why_not_ready(0.0) or "the engine is starting", self.last_words)

    async def _call(self, command: LoadModel | UnloadModel | CheckIntegrity) -> None:
        self._require_ready()
        answer = self._calls[command.call_id] = asyncio.get_running_loop().create_future()
        try:
            await self._link.send(command)
            await answer
        finally:
            self._calls.pop(command.call_id, None)

    async def _supervise(self) -> None:
        """Follow one life after the other."""
        while True:
            ended = self._link.attach()
            follow = asyncio.create_task(self._follow())
            waited: list[asyncio.Future[Any]] = [ended, follow]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():  # a message that cannot be read: the two processes are not of one version, or we have a defect
                logger.error("the engine's messages cannot be followed", exc_info=follow.exception())
                self._link.process.kill()
                await ended
            follow.cancel()
            was_ready = self.is_ready
            self._mourn(self._link.last_words())
            await asyncio.to_thread(self._link.stop)
            if self.num_deaths > self._max_restarts or (not was_ready and self.num_deaths == 1):
                self._on_fatal(f"{self.last_words}")
                return
            self._link = await asyncio.to_thread(self._make_link)

    def _mourn(self, words: LastWords) -> None:
        """Fail everybody who waits, with the reason."""
        self.is_ready, self.status = False, None
        self.num_deaths += 1
        self.last_words = words
        logger.error("the engine process died: %s", words)
        self._metrics.on_death()
        self._fail_all(EngineDead(f"the engine process died: {words}", words))

    def _fail_all(self, error: Exception) -> None:
        for request_id, stream in list(self._streams.items()):
            self._close(request_id, None)
            stream.fail(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)

    async def _follow(self) -> None:
        while True:
            event = await self._link.receive()
            if isinstance(event, Models):
                await self._on_models(event.models)
                self.is_ready = True
                self.status_time = time.monotonic()
            else:
                self._handle(event)

    def _handle(self, event: Event) -> None:
        self._handlers[type(event)](event)

    def _deal(self, event: Deltas) -> None:
        self.status_time = now = time.monotonic()
        touched: dict[Stream, None] = {}
        for delta in event.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                self._record(delta, now)
                stream.put(delta)
                touched[stream] = None
        for finished in event.finished:
            stream = self._streams.get(finished.request_id)
            if stream is not None:
                self._close(finished.request_id, finished)
                stream.end(finished)
        for stream in touched:
            stream.wake()

    def _record(self, delta: SequenceDelta, now: float) -> None:
        record, index = self._records[delta.request_id], delta.index
        if delta.token_ids:
            last, ttft, itl = record.last_s[index], None, None
            if record.request.stream:  # otherwise everything comes at the end, and the engine says what took how long
                ttft, itl = (None, now - last) if last else (now - record.request.arrival_s, None)
            self._metrics.on_tokens(record.request.model, len(delta.token_ids), ttft, itl)
            record.last_s[index] = now
            record.num_tokens[index] += len(delta.token_ids)
        record.finish_reasons[index] = delta.finish_reason

    def _close(self, request_id: str, finished: Finished | None) -> None:
        del self._streams[request_id]
        record = self._records.pop(request_id)
        self._num_open[record.request.model] -= record.request.params.n
        self._metrics.on_end(record, finished)

    def _accept(self, event: Accepted) -> None:
        stream = self._streams.get(event.request_id)
        if stream is not None:
            stream.accept(event.request_id)

    def _refuse(self, event: Refused) -> None:
        stream = self._streams.get(event.request_id)
        if stream is not None:
            self._close(event.request_id, None)
            stream.fail(_error(event.kind, event.message))

    def _answer(self, event: Answer) -> None:
        call = self._calls.get(event.call_id)
        if call is not None and not call.done():
            if event.kind:
                call.set_exception(_error(event.kind, event.message))
            else:
                call.set_result(None)

    def _take_status(self, event: Status) -> None:
        self.status, self.status_time = event, time.monotonic()
        self._metrics.on_status(event)


def _error(kind: str, message: str) -> ApportionError:
    """The engine's error again, of its own class."""
    known = getattr(errors, kind, None)
    return known(message) if isinstance(known, type) and issubclass(known, ApportionError) else InternalError(f"{kind}: {message}")


_background: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly


def _spawn(work: Any) -> None:
    task = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
