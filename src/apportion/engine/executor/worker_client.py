"""The engine's side of a lane's workers: calls, tickets, what a death looks like. In which thread or process they run is the link's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from apportion.core.config import ModelConfig
from apportion.core.errors import ApportionError, ExecutorDied
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.model_spec import ModelSpec
from apportion.core.schedule import ModelRunnerOutput, SchedulerOutput
from apportion.engine.executor.executor import WeightsHandle

# (rank, kind, value); kinds: 'output' of a step, 'progress' of a load, 'result' or 'refused' of a call, 'failed' with the error that kept
# the worker from starting, 'died' with the worker's report, 'gone' with how it ended
Reply = tuple[int, str, Any]

CAUSE_TIMEOUT_S = 0.5  # how long the rank that died first is waited for when another one complains of it


class Link(Protocol):
    """The way to one worker, in process `pid`. Its replies arrive in the queue it was made with."""

    pid: int

    def send(self, message: tuple[Any, ...]) -> None:
        """Never blocks on compute. Silent when the worker is gone: its last reply says so."""

    def close(self) -> None:
        """End the worker and wait for it. Idempotent."""


class WorkerClient:
    """Executor over the workers of one lane, one per rank. Rank 0 answers steps; every rank answers calls."""

    def __init__(self, name: str, links: list[Link], replies: SimpleQueue[Reply]) -> None:
        self.name, self._links, self._replies = name, links, replies
        self._tickets: deque[int] = deque()
        self._next_ticket = 0
        self._outputs: list[tuple[int, ModelRunnerOutput]] = []
        self._results: list[dict[str, Any]] = [{} for _ in links]
        self._death: ApportionError | None = None
        self.on_progress: Callable[[int, int], None] | None = None  # bytes of a model loaded, bytes in all
        self._mourner: int | None = None  # the rank whose word stands and that itself died of another's death

    @property
    def is_alive(self) -> bool:
        self._drain(0.0)
        return self._death is None

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that compute, in rank order."""
        return tuple(link.pid for link in self._links)

    def load_model(
        self, config: ModelConfig, spec: ModelSpec, kv_groups: tuple[KVGroupSpec, ...], weights: WeightsHandle | None = None
    ) -> WeightsHandle:
        parts = zip(weights.arena, weights.manifest, strict=True) if weights else [None] * len(self._links)
        loaded = self._call("load_model", [(config, spec, kv_groups, part) for part in parts])
        arenas, manifests = zip(*loaded, strict=True)
        return weights or WeightsHandle(config.name, sum(arena.nbytes for arena in arenas), arenas, manifests)

    def unload_model(self, name: str) -> None:
        self._call("unload_model", [(name,)] * len(self._links))

    def submit(self, step: SchedulerOutput) -> int:
        self._raise_if_dead()
        for link in self._links:
            link.send(("step", step))
        self._next_ticket += 1
        self._tickets.append(self._next_ticket)
        return self._next_ticket

    def poll(self, timeout_s: float) -> list[tuple[int, ModelRunnerOutput]]:
        if not self._outputs:
            self._drain(timeout_s if self._tickets else 0.0)
        if not self._outputs:
            self._raise_if_dead()
        outputs, self._outputs = self._outputs, []
        return outputs

    def shutdown(self) -> None:
        for link in self._links:
            link.close()
        self._death = self._death or ExecutorDied(f"executor {self.name!r} was shut down")

    def _call(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """`method` on every rank. Raises what a rank refused with, once all have answered."""
        self._raise_if_dead()
        for link, args in zip(self._links, arguments, strict=True):
            link.send(("call", method, args))
        while not all(self._results):
            self._drain(1.0)
            self._raise_if_dead()
        results, self._results = self._results, [{} for _ in self._links]
        for result in results:
            if "refused" in result:
                raise result["refused"]
        return [result["result"] for result in results]

    def _drain(self, timeout_s: float) -> None:
        """Take in what has arrived; wait up to timeout_s for the first."""
        deadline = time.monotonic() + timeout_s
        taken = False
        while True:
            wait = 0.0 if taken else deadline - time.monotonic()
            try:
                reply = self._replies.get(timeout=wait) if wait > 0 else self._replies.get_nowait()
            except Empty:
                return
            taken = True
            self._take(*reply)

    def _take(self, rank: int, kind: str, value: Any) -> None:
        if kind == "output":
            self._outputs.append((self._tickets.popleft(), value))
        elif kind in ("result", "refused"):
            self._results[rank] = {kind: value}
        elif kind == "progress":
            if self.on_progress is not None:
                self.on_progress(*value)
        elif kind == "failed":
            self._death = self._death or value
        elif self._death is None or self._mourner not in (None, rank):
            who = f"executor {self.name!r}" + (f" rank {rank}" if len(self._links) > 1 else "")
            self._mourner = rank if value.startswith(ExecutorDied.__name__) else None
            self._death = ExecutorDied(f"{who} died: {value.splitlines()[0]}", value)
            if self._mourner is not None:
                self._drain(CAUSE_TIMEOUT_S)

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise self._death


def refusable(error: BaseException) -> bool:
    """Whether a call that raised `error` leaves its worker usable."""
    return isinstance(error, ApportionError) and not isinstance(error, ExecutorDied)
