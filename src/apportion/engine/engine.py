"""The engine: N models over one KV arena, lanes that run them, and the step that joins the two.

It decides every allocation, so phases and models never race for a block. It knows messages and handles; it must not know torch,
tensors or text: tokens become text in the `OutputProcessor` it is given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from apportion.core.config import PHASES, CacheConfig, LaneConfig, ModelConfig, SchedulerConfig
from apportion.core.errors import ApportionError, ExecutorDied, InternalError, InvalidParameter, InvalidRequest, OutOfMemory
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.metrics import EngineMetrics
from apportion.core.model_spec import ModelSpec
from apportion.core.request import Request, RequestUpdate
from apportion.core.schedule import TokenLogprobs
from apportion.engine.executor.executor import WeightsHandle
from apportion.engine.lane import MAX_DEATHS, ExecutorFactory, Lane
from apportion.engine.scheduler import Scheduler
from apportion.engine.share_policies import SharePolicy
from apportion.engine.share_policies.round_robin import RoundRobin
from apportion.kvcache.arena import Arena
from apportion.kvcache.kv_cache_manager import KVCacheManager

NUM_REMEMBERED_STEPS = 4096
POLL_SLICE_S = 0.0002  # how long one lane is waited for while another may end first


class OutputProcessor(Protocol):
    def append(
        self, request: Request, token_ids: list[int], logprobs: list[TokenLogprobs], prompt_logprobs: list[TokenLogprobs]
    ) -> str | int | None:
        """Take in a request's news (its `finish_reason` is set with its last ones); returns the stop string that ends it, if one does."""


@dataclass(slots=True, eq=False)
class EngineModel:
    """One model of the engine. weights: kept as long as the model is, so that lanes can attach and restart."""

    config: ModelConfig
    spec: ModelSpec
    kv_groups: tuple[KVGroupSpec, ...]
    scheduler: Scheduler
    weights: WeightsHandle | None = None


class Engine:
    """Holds models and lanes. Not thread-safe: one thread calls `step`, `add_request` and `abort`.

    ended_steps: model and number of tokens of the last steps that ended, for whoever measures to take away.

    make_executor: starts an executor for a lane, over the KV memory that `arena` describes. output_processor: None leaves tokens as
    they are.
    """

    def __init__(
        self,
        lanes: Sequence[LaneConfig],
        make_executor: ExecutorFactory,
        arena: Arena,
        scheduler_config: SchedulerConfig | None = None,
        cache_config: CacheConfig | None = None,
        *,
        share_policy: SharePolicy | None = None,
        output_processor: OutputProcessor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if PHASES - {phase for lane in lanes for phase in lane.phases}:
            raise InvalidParameter("the lanes leave out prefill or decode: every request needs both")
        self.arena = arena
        self.models: dict[str, EngineModel] = {}
        self.lanes: list[Lane] = []
        self._scheduler_config = scheduler_config or SchedulerConfig()
        self._cache_config = cache_config or CacheConfig()
        self._share_policy = share_policy or RoundRobin()
        self._output_processor = output_processor
        self._clock = clock
        self._updates: list[RequestUpdate] = []  # for `step` to return
        self._death: ExecutorDied | None = None
        self.ended_steps: deque[tuple[str, int]] = deque(maxlen=NUM_REMEMBERED_STEPS)
        try:
            for config in lanes:
                self.lanes.append(Lane(config, make_executor))
        except BaseException:
            self.shutdown()
            raise

    def step(self, timeout_s: float = 0.1) -> list[RequestUpdate]:
        """Fill every lane, wait up to `timeout_s` for a step to end, and return what changed for which request."""
        for lane in list(self.lanes):
            self._guarded(lane, self._fill)
        busy = [lane for lane in self.lanes if lane.tickets or not lane.executor.is_alive]
        slice_s = 0.0 if self._updates else timeout_s if len(busy) <= 1 else min(timeout_s, POLL_SLICE_S)
        num_rounds = 1 + int(timeout_s / (slice_s * len(busy))) if 0.0 < slice_s < timeout_s else 1
        for _ in range(num_rounds):
            if sum([self._guarded(lane, self._collect, slice_s) for lane in busy if lane in self.lanes]):
                break
        updates, self._updates = self._updates, []
        if not self.has_unfinished:
            self._check_conservation()
        return updates

    def add_request(self, request: Request) -> None:
        """Queue a request. Errors: InvalidRequest (it cannot be served), ExecutorDied (no lane is left for its model)."""
        model = self.models.get(request.model)
        if model is None:
            raise InvalidRequest(f"unknown model {request.model!r}; loaded: {', '.join(self.models) or 'none'}")
        if not self._is_served(request.model):
            raise self._death or ExecutorDied(f"the engine has no lane for model {request.model!r}: it was shut down")
        model.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request, wherever it is; one that is unknown or finished already is passed over."""
        for model in self.models.values():
            request = model.scheduler.get(request_id)
            if request is not None:
                model.scheduler.finish(request, "abort")
                self._updates.append(RequestUpdate(request))

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do or to tell."""
        return bool(self._updates) or any(m.scheduler.has_unfinished for m in self.models.values())

    def add_model(self, config: ModelConfig, spec: ModelSpec, kv_groups: Sequence[KVGroupSpec], version: str = "") -> EngineModel:
        """Load a model on every lane that serves it. version: names the weights for the prefix cache.

        Errors: OutOfMemory when an explicit `max_model_len` does not fit in the KV memory (a default one is lowered to what does);
        whatever loading raises.
        """
        if config.name in self.models:
            raise InvalidParameter(f"a model named {config.name!r} is loaded; remove it first or give another name")
        lanes = [lane for lane in self.lanes if lane.serves(config.name)]
        if PHASES - {phase for lane in lanes for phase in lane.config.phases}:
            raise InvalidParameter(f"no lane takes prefill or none takes decode for model {config.name!r}; see its lanes' `models`")
        kv = KVCacheManager(
            self.arena,
            config.name,
            kv_groups,
            version=version,
            enable_prefix_caching=self._cache_config.enable_prefix_caching,
            max_chunk=self._scheduler_config.max_num_batched_tokens,
        )
        try:
            max_model_len = self._resolve_max_model_len(config, spec, kv)
            scheduler = Scheduler(config.name, self._scheduler_config, kv, max_model_len, self._clock)
            model = EngineModel(config, spec, tuple(kv_groups), scheduler)
            for lane in lanes:
                model.weights = lane.executor.load_model(config, spec, model.kv_groups, model.weights)
        except BaseException:
            kv.close()
            raise
        self.models[config.name] = model
        return model

    def remove_model(self, name: str) -> None:
        """Abort the model's requests, wait for its steps, give back its KV memory and its weights."""
        model = self.models[name]
        for request in model.scheduler.unfinished:
            self.abort(request.request_id)
        news: list[RequestUpdate] = []
        while model.scheduler.has_in_flight:
            news += self.step()
        self._updates = news + self._updates
        del self.models[name]  # a lane that dies from here on does not load it again
        for lane in list(self.lanes):
            if lane.serves(name):
                self._guarded(lane, lambda lane: lane.executor.unload_model(name))
        model.scheduler.close()

    def set_quota(self, model: str, limit_bytes: int | None) -> None:
        """The most KV bytes `model` may hold from now on. What it holds beyond is reclaimed; the rest comes back as its requests finish."""
        quota = self.models[model].scheduler.kv.quota
        quota.limit_bytes = limit_bytes
        self.arena.num_releases += 1
        if limit_bytes is not None and quota.held_bytes > limit_bytes:
            self.reclaim(model, quota.held_bytes - limit_bytes)

    def reclaim(self, model: str, num_bytes: int) -> int:
        """Take KV memory from `model` without ending a request: cached blocks go, live ones move together. Returns the bytes."""
        return self.models[model].scheduler.reclaim(num_bytes)

    def metrics(self) -> dict[str, EngineMetrics]:
        return {name: model.scheduler.refresh_metrics() for name, model in self.models.items()}

    def check_integrity(self) -> None:
        """Raises InternalError unless every block and slab is accounted for. Takes time in proportion to the blocks held."""
        self.arena.check_integrity()
        for model in self.models.values():
            model.scheduler.check_integrity()

    def shutdown(self) -> None:
        """End every executor. Idempotent."""
        while self.lanes:
            self.lanes.pop().executor.shutdown()

    def _fill(self, lane: Lane) -> None:
        names = [name for name in self.models if lane.serves(name)]
        while names and lane.has_room and lane.executor.is_alive:
            for name in self._share_policy.order(lane.config.name, names):
                scheduler = self.models[name].scheduler
                step = scheduler.schedule(lane.lane_id, lane.config.phases)
                if scheduler.failed:
                    self._updates += scheduler.failed
                    scheduler.failed = []
                if step is not None:
                    self._share_policy.ran(lane.config.name, name, step.output.total_tokens)
                    lane.submit(scheduler, step)
                    break
            else:
                return

    def _collect(self, lane: Lane, timeout_s: float) -> int:
        ended = lane.poll(timeout_s)
        for scheduler, step, output in ended:
            updates = scheduler.update(step, output)
            scheduler.metrics.softmax_rows_recomputed += output.softmax_rows_recomputed
            self.ended_steps.append((scheduler.model, step.output.total_tokens))
            self._process(updates)  # before the next step that has ended: a request that its text ends takes no more tokens
            self._updates += updates
        return len(ended)

    def _process(self, updates: list[RequestUpdate]) -> None:
        """Let text end requests: a stop string is seen only once tokens have become text."""
        if self._output_processor is None:
            return
        for update in updates:
            request = update.request
            stop = self._output_processor.append(request, update.token_ids, update.logprobs, update.prompt_logprobs)
            if stop is not None and request.is_finished:
                request.finish_reason, request.stop_reason = "stop", stop
            elif stop is not None:
                self.models[request.model].scheduler.finish(request, "stop", stop)

    def _guarded(self, lane: Lane, action: Callable[..., int | None], *args: float) -> int:
        try:
            return action(lane, *args) or 0
        except ExecutorDied as death:
            self._bury(lane, death)
            return 1

    def _bury(self, lane: Lane, death: ExecutorDied) -> None:
        """Fence a dead lane, start it again, and fail what no lane can run any more."""
        self._death = death
        cause = death.cause or str(death)
        tickets = lane.take_tickets()
        given_up: list[RequestUpdate] = []
        for model in self.models.values():
            given_up += model.scheduler.lane_died(lane.lane_id, tickets.get(model.scheduler, []), cause)
        self._updates += given_up
        lane.num_deaths = 0 if given_up else lane.num_deaths + 1  # with its likely cause gone a lane starts anew
        if lane.num_deaths < MAX_DEATHS and self._restart(lane):
            return
        lane.executor.shutdown()
        self.lanes.remove(lane)
        for name, model in self.models.items():
            if not self._is_served(name):
                for request in model.scheduler.unfinished:
                    model.scheduler.finish(request, "error", error=f"no lane is left for model {name!r}: {cause}")
                    self._updates.append(RequestUpdate(request))

    def _restart(self, lane: Lane) -> bool:
        try:
            lane.restart()
            for name, model in self.models.items():
                if lane.serves(name):
                    lane.executor.load_model(model.config, model.spec, model.kv_groups, model.weights)
        except ApportionError as error:
            cause = getattr(error, "cause", None)
            self._death = ExecutorDied(f"lane {lane.config.name!r} died and could not be started again: {error}", cause)
            return False
        return True

    def _is_served(self, model: str) -> bool:
        return not PHASES - {phase for lane in self.lanes if lane.serves(model) for phase in lane.config.phases}

    def _resolve_max_model_len(self, config: ModelConfig, spec: ModelSpec, kv: KVCacheManager) -> int:
        wanted = config.max_model_len or spec.max_position
        fits = kv.max_request_len() + 1  # the last token is never stored
        if wanted > fits and (config.max_model_len is not None or fits < 2):
            needed = kv.slabs_for(wanted - 1) * self.arena.slab_bytes
            raise OutOfMemory(
                f"max_model_len {wanted} of model {config.name!r} needs {needed} bytes of KV memory and there are {self.arena.num_bytes};"
                f" set max_model_len to at most {fits} or kv_cache_memory to at least {needed}"
            )
        return min(wanted, fits)

    def _check_conservation(self) -> None:
        """The cheap half of `check_integrity`: with nothing to do, no block may be live."""
        for name, model in self.models.items():
            if model.scheduler.kv.num_live:
                raise InternalError(f"model {name!r} is idle and {model.scheduler.kv.num_live} of its KV blocks are still live")
