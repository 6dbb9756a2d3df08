"""An executor whose steps take simulated time: the engine's real scheduler, KV cache and policies run a workload in milliseconds.

Nothing is computed: every sampled token is `TOKEN`, a step lasts as long as the cost model says, and the clock jumps from event to event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from apportion.core.config import CacheConfig, LaneConfig, ModelConfig, SchedulerConfig
from apportion.core.errors import InvalidParameter
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.model_spec import ModelSpec
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import ModelRunnerOutput, SchedulerOutput
from apportion.engine.engine import Engine
from apportion.engine.executor.executor import WeightsHandle
from apportion.kvcache.arena import Arena, choose_slab_bytes
from apportion.simulator.serving import Row, StepCost

TOKEN = 1


class StepModel(Protocol):
    def step(self, rows: Sequence[Row]) -> StepCost:
        """Seconds of a batch."""


@dataclass
class Clock:
    """Simulated seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class BatchReader:
    """What each step of an engine computes, as rows. It follows the requests: their tokens, those that a worker sampled itself included."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}  # request -> tokens that the worker knows

    def read(self, step: SchedulerOutput) -> tuple[list[Row], list[str]]:
        """(rows, requests of which a token is sampled)"""
        for request in step.finished_ids:
            self._known.pop(request, None)
        starts = {}
        for new in step.new_requests:
            self._known[new.request_id] = len(new.token_ids)
            starts[new.request_id] = new.num_computed_tokens
        for cached in step.cached_requests:
            self._known[cached.request_id] += len(cached.new_token_ids)
            starts[cached.request_id] = cached.num_computed_tokens
        rows, sampled = [], []
        for request, count in step.num_scheduled_tokens.items():
            reads = starts[request] + count == self._known[request]
            rows.append(Row(count, starts[request], reads))
            if reads:
                self._known[request] += 1
                sampled.append(request)
        return rows, sampled


@dataclass
class SimulatedExecutor:
    """One lane. Steps run one after another; `poll` moves the clock to the end of the next, but not beyond `until`."""

    clock: Clock
    model: StepModel
    until: Callable[[], float] = lambda: float("inf")
    is_alive: bool = True
    busy_s: float = 0.0
    extrapolated: int = 0
    steps: list[tuple[float, float, int]] = field(default_factory=list)  # (start, end, tokens)
    _reader: BatchReader = field(default_factory=BatchReader)
    _queue: deque[tuple[int, float, ModelRunnerOutput]] = field(default_factory=deque)
    _free_at: float = 0.0

    def load_model(
        self, config: ModelConfig, spec: ModelSpec, kv_groups: tuple[KVGroupSpec, ...], weights: WeightsHandle | None = None
    ) -> WeightsHandle:
        return weights or WeightsHandle(config.name, 0)

    def unload_model(self, name: str) -> None:
        self._reader = BatchReader()

    def submit(self, step: SchedulerOutput) -> int:
        rows, sampled = self._reader.read(step)
        cost = self.model.step(rows) if rows else None
        start = max(self.clock.now, self._free_at)
        self._free_at = start + (cost.seconds if cost else 0.0)
        self.busy_s += self._free_at - start
        self.extrapolated += bool(cost and cost.extrapolated)
        self.steps.append((start, self._free_at, step.total_tokens))
        output = ModelRunnerOutput(step.step_id, step.model, {r: [TOKEN] for r in sampled}, execute_s=self._free_at - start)
        self._queue.append((len(self.steps), self._free_at, output))
        return len(self.steps)

    def poll(self, timeout_s: float) -> list[tuple[int, ModelRunnerOutput]]:
        if not self._queue or self._queue[0][1] > max(self.clock.now, self.until()):
            return []
        ticket, end, output = self._queue.popleft()
        self.clock.now = max(self.clock.now, end)
        return [(ticket, output)]

    def shutdown(self) -> None:
        self.is_alive = False

    @property
    def has_queued(self) -> bool:
        return bool(self._queue)


@dataclass(frozen=True)
class Arrival:
    """A request of a workload. at_s: when it comes; token_ids: its prompt, or only its length where prefixes are not to be shared."""

    at_s: float
    prompt_len: int
    output_len: int
    token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Served:
    """One finished request, in simulated seconds."""

    arrival: Arrival
    first_token_s: float
    finish_s: float

    @property
    def ttft(self) -> float:
        return self.first_token_s - self.arrival.at_s

    @property
    def tpot(self) -> float:
        return (self.finish_s - self.first_token_s) / max(1, self.arrival.output_len - 1)

    @property
    def latency(self) -> float:
        return self.finish_s - self.arrival.at_s


@dataclass(frozen=True)
class Workday:
    """What came of a workload. seconds: from the first arrival to the last end. extrapolated: steps outside what was measured."""

    served: Sequence[Served]
    seconds: float
    busy: float
    num_steps: int
    num_preemptions: int
    extrapolated: int

    @property
    def tokens_per_s(self) -> float:
        return sum(s.arrival.output_len for s in self.served) / self.seconds

    def percentile(self, metric: str, q: float) -> float:
        """Of 'ttft', 'tpot' or 'latency'; q between 0 and 100, nearest rank."""
        values = sorted(getattr(s, metric) for s in self.served)
        return float(values[min(len(values) - 1, round(q / 100 * (len(values) - 1)))])


def serve(
    workload: Sequence[Arrival],
    spec: ModelSpec,
    model: StepModel,
    kv_bytes: int,
    *,
    scheduler: SchedulerConfig | None = None,
    cache: CacheConfig | None = None,
    depth: int = 2,
    kv_dtype: str = "auto",
    max_concurrency: int | None = None,
) -> Workday:
    """Run a workload through the engine's own scheduler in simulated time.

    max_concurrency: requests in the system at once; later ones wait outside and their clock starts when they are let in (a closed loop).
    Errors: InvalidParameter for an empty workload; InvalidRequest for a request that the engine refuses.
    """
    if not workload or any(a.prompt_len < 1 or a.output_len < 1 for a in workload):
        raise InvalidParameter("a workload needs requests of at least one prompt and one output token")
    cache = cache or CacheConfig()
    groups = spec.kv_groups(kv_dtype, cache.block_size)
    arena = Arena(kv_bytes, choose_slab_bytes([g.block_bytes for g in groups], kv_bytes))
    clock, waiting = Clock(), deque(sorted(workload, key=lambda a: a.at_s))
    inside: dict[str, Arrival] = {}
    limit = max_concurrency or len(workload)

    def next_arrival() -> float:
        return waiting[0].at_s if waiting and len(inside) < limit else float("inf")

    executor = SimulatedExecutor(clock, model, next_arrival)
    engine = Engine([LaneConfig(name="main", depth=depth)], lambda _: executor, arena, scheduler, cache, clock=clock)
    engine.add_model(ModelConfig(model="model"), spec, groups)
    firsts: dict[str, float] = {}
    served: list[Served] = []
    clock.now = waiting[0].at_s
    begun = clock.now
    while waiting or inside:
        while waiting and len(inside) < limit and waiting[0].at_s <= clock.now:
            arrival = waiting.popleft()
            if max_concurrency is not None:
                arrival = Arrival(clock.now, arrival.prompt_len, arrival.output_len, arrival.token_ids)
            name = str(len(workload) - len(waiting))
            inside[name] = arrival
            engine.add_request(_request(name, arrival))
        updates = engine.step(0.0)
        for update in updates:
            request = update.request
            if update.token_ids:
                firsts.setdefault(request.request_id, clock.now)
            if request.is_finished and request.request_id in inside:
                arrival = inside.pop(request.request_id)
                served.append(Served(arrival, firsts.pop(request.request_id, clock.now), clock.now))
        if not updates and next_arrival() < float("inf"):
            clock.now = max(clock.now, next_arrival())
    metrics = engine.metrics()["model"]
    return Workday(served, clock.now - begun, executor.busy_s, len(executor.steps), metrics.num_preemptions, executor.extrapolated)


def _request(name: str, arrival: Arrival) -> Request:
    tokens = list(arrival.token_ids) if arrival.token_ids is not None else [_own_token(name, i) for i in range(arrival.prompt_len)]
    params = SamplingParams(max_tokens=arrival.output_len, ignore_eos=True, temperature=0.0)
    return Request(name, "model", tokens, params)


def _own_token(name: str, position: int) -> int:
    """A token that no other request has at this position, so that prefixes are not shared by accident."""
    return 2 + (int(name) * 1_000_003 + position) % 1_000_000_000
