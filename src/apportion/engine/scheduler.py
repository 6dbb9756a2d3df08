"""Decides each step of one model: which requests, how many tokens of each, on the lane that asks.

A request is a count of computed tokens chasing a count of known ones; prefill and decode differ only in the distance. The scheduler
knows requests, the KV manager's tables and which lane knows which request; it must not know executors, tensors or text.

Progress: requests are served in the policy's order. When blocks run short the last in that order gives up its own, never an earlier
one, so the first always goes on; and a request is admitted only where all its known tokens would fit, beside a share of what the
running ones may still generate. That share grows with every preemption and decays with every step.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable

from apportion.core.config import SchedulerConfig
from apportion.core.errors import InternalError, InvalidParameter, InvalidRequest
from apportion.core.metrics import EngineMetrics
from apportion.core.request import NO_LANE, Request, RequestStatus, RequestUpdate
from apportion.core.schedule import CachedRequest, ModelRunnerOutput, NewRequest, SchedulerOutput
from apportion.engine.policies import POLICIES
from apportion.engine.step import Draft, Step
from apportion.kvcache.kv_cache_manager import NOTHING_NEW, Drains, KVCacheManager, Moves, NewBlocks

GROWTH_START, GROWTH_STEP, GROWTH_DECAY = 0.1, 0.1, 0.998  # at first, per preemption, per step
RETRY_STEPS = 16  # how long a request that did not fit is not tried again, unless blocks come back
MAX_REPLAYS = 2  # a request that was in flight in more lane deaths in a row than this is taken for their cause


class Scheduler:
    """Continuous batching with chunked prefill, preemption by recompute and any number of steps in flight.

    max_model_len: prompt and output of one request together. clock: seconds, monotonic.
    """

    def __init__(
        self, model: str, config: SchedulerConfig, kv: KVCacheManager, max_model_len: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < max_model_len:
            raise InvalidParameter(
                f"without chunked prefill max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least"
                f" max_model_len ({max_model_len})"
            )
        self.model = model
        self.config = config
        self.kv = kv
        self.max_model_len = max_model_len
        self.clock = clock
        self.running: list[Request] = []  # in the policy's order
        self.waiting: list[Request] = []  # in the policy's order
        self.metrics = EngineMetrics()
        self._order_key = POLICIES.get(config.policy)
        self.failed: list[RequestUpdate] = []  # requests that `schedule` had to end, for the engine to take and tell
        self._requests: dict[str, Request] = {}
        self._in_flight: dict[int, Step] = {}
        self._finished_ids: dict[int, list[str]] = {}  # lane -> what it may forget
        self._num_steps = 0
        self._num_arrivals = 0
        self._moves = Moves()  # for the next step to do
        self._growth = GROWTH_START
        self._blocked: tuple[Request, int, int] | None = None  # who could not be admitted, and when

    def add(self, request: Request) -> None:
        """Queue a request. Errors: InvalidRequest when it is empty, too long or could never fit in the KV memory."""
        params = request.sampling_params
        num_prompt, pools = request.num_prompt_tokens, request.pooling_params is not None
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id!r} is in use")
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty; give at least one token")
        if num_prompt >= self.max_model_len + pools:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens and max_model_len is {self.max_model_len}"
                + ("" if pools else f": at most {self.max_model_len - 1} leave room for output")
            )
        limit = min(self.max_model_len, num_prompt + (0 if pools else params.max_tokens or self.max_model_len))
        most = self.kv.max_request_len() + 1  # the last token is never stored
        if limit > most:
            raise InvalidRequest(
                f"a request of {num_prompt} prompt tokens and up to {limit - num_prompt} output tokens does not fit in the KV memory of"
                f" {self.kv.arena.slabs_within(self.kv.quota) * self.kv.arena.slab_bytes} bytes, which holds {most} tokens;"
                f" shorten the prompt, lower max_tokens or raise kv_cache_memory"
            )
        stops = set(params.stop_token_ids or ())
        request.stop_ids = frozenset(stops if params.ignore_eos else stops | request.eos_token_ids)
        request.max_total_tokens = limit
        request.arrival_index = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._wait(request, RequestStatus.WAITING)
        self.metrics.prompt_tokens += num_prompt

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    @property
    def unfinished(self) -> list[Request]:
        return list(self._requests.values())

    @property
    def has_unfinished(self) -> bool:
        """Whether a request is not finished or a step has not ended."""
        return bool(self._requests or self._in_flight or self._moves.ops)

    @property
    def has_in_flight(self) -> bool:
        return bool(self._in_flight)

    def schedule(self, lane: int, phases: frozenset[str]) -> Step | None:
        """The next step for `lane`, which takes `phases` of the work; None when there is nothing it could do now."""
        draft = Draft(lane, self.config.max_num_batched_tokens, self.clock)
        takes_decode = "decode" in phases
        prefills: list[Request] = []
        for request in self.running:  # shrinks at its end when somebody is preempted
            if request.num_in_flight_steps and request.lane != lane:
                continue
            start = request.num_computed_tokens + request.num_in_flight_tokens
            known = len(request.token_ids) + request.num_pending_samples
            if known - start == 1 and start >= len(request.prompt_token_ids):
                if takes_decode and known < request.max_total_tokens and draft.budget and draft.may_sample(request):
                    self._place(draft, request, start, 1)
            elif known > start:
                prefills.append(request)
        if "prefill" in phases:
            for request in prefills:
                if request.status is RequestStatus.RUNNING and draft.budget:
                    start = request.num_computed_tokens + request.num_in_flight_tokens
                    known = len(request.token_ids) + request.num_pending_samples
                    num_tokens = self._chunk(known - start, draft.budget)
                    waits = num_tokens == known - start and not draft.may_sample(request)
                    self._place(draft, request, start, num_tokens - waits)
            self._admit(draft)
        for request, error in draft.failed.items():
            self.finish(request, "error", error=error)
            self.failed.append(RequestUpdate(request))
        return self._commit(draft) if draft.rows or self._moves.ops else None

    def reclaim(self, num_bytes: int) -> int:
        """Give KV memory back to the arena, moving live blocks together if need be; returns the bytes, some of them free only when the
        next step has ended."""
        freed = self.kv.reclaim(num_bytes, self._moves)
        for request in self._moves.requests:
            self._forget(request)  # its table changed in places: the next lane hears of it in full
        return freed

    def update(self, step: Step, output: ModelRunnerOutput) -> list[RequestUpdate]:
        """Take in what a step produced; returns what changed for whom. Requests that have finished meanwhile are passed over."""
        self._end(step)
        self._growth *= GROWTH_DECAY
        now = self.clock()
        updates: list[RequestUpdate] = []
        for request, num_tokens, samples, epoch in step.rows:
            if request.status is RequestStatus.FINISHED:
                continue
            request_id = request.request_id
            error = output.errors.get(request_id) if output.errors else None
            prompt_logprobs = []
            if epoch == request.epoch and error is None:
                if output.prompt_logprobs:
                    known = request.num_prompt_logprobs - request.num_computed_tokens
                    prompt_logprobs = output.prompt_logprobs.get(request_id, [])[max(0, known) :]
                    request.num_prompt_logprobs += len(prompt_logprobs)
                request.num_computed_tokens += num_tokens
                request.num_in_flight_tokens -= num_tokens
                request.num_replays = 0
                self.kv.publish(request)
            tokens = output.token_ids.get(request_id, [])
            if error is None and bool(tokens) != samples:
                error = f"the executor returned {len(tokens)} tokens for request {request_id} where {int(samples)} was due"
            if error is not None:
                self.finish(request, "error", error=error)
                updates.append(RequestUpdate(request))
            elif request.pooling_params and epoch == request.epoch and request.take_pooled(output.pooled.get(request_id)):
                self.finish(request, "stop")
                updates.append(RequestUpdate(request))
            elif tokens:
                tokens = self._append(request, tokens, now)
                logprobs = output.logprobs.get(request_id, [])[: len(tokens)] if output.logprobs else []
                updates.append(RequestUpdate(request, tokens, logprobs, prompt_logprobs))
            elif prompt_logprobs:
                updates.append(RequestUpdate(request, prompt_logprobs=prompt_logprobs))
        return updates

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """End a request at any time, also while steps with it are in flight: what they bring is dropped."""
        if request.is_finished:
            return
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)
        self._give_up(request)
        del self._requests[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason, request.error = reason, stop_reason, error
        request.times.finished_s = self.clock()

    def lane_died(self, lane: int, steps: Iterable[Step], cause: str) -> list[RequestUpdate]:
        """Fence a lane: its steps will never end and touch nothing any more. Its requests go on from what finished steps have stored."""
        hit: set[Request] = set()
        moved: set[Request] = set()
        for step in steps:
            self._end(step)
            moved |= step.moved
            for request, num_tokens, _, epoch in step.rows:
                if epoch == request.epoch:
                    request.num_in_flight_tokens -= num_tokens
                if not request.is_finished:
                    hit.add(request)
        self._finished_ids.pop(lane, None)
        for request in self._requests.values():
            if request.lane == lane:
                request.lane = NO_LANE
        updates = []
        for request in sorted(hit, key=self._order_key):
            request.num_replays += 1
            if request.num_replays > MAX_REPLAYS:
                self.finish(request, "error", error=f"gave up after {request.num_replays} lane deaths with this request in flight: {cause}")
                updates.append(RequestUpdate(request))
            elif request.status is RequestStatus.RUNNING and (request in moved or not self.kv.rewind(request)):
                self._preempt(request)
        return updates

    def close(self) -> None:
        """Leave the arena: no request and no step is left, so moves that no step has done need not be."""
        self.kv.ended(self._moves.drains)
        self.kv.close()

    def refresh_metrics(self) -> EngineMetrics:
        self.metrics.num_requests_running = len(self.running)
        self.metrics.num_requests_waiting = len(self.waiting)
        self.metrics.prefix_cache_queries = self.kv.num_queried_tokens
        self.metrics.prefix_cache_hits = self.kv.num_hit_tokens
        self.metrics.kv_cache_usage_perc = self.kv.usage
        return self.metrics

    def check_integrity(self) -> None:
        """Raises InternalError unless blocks add up and, with no step in flight, nothing drains."""
        self.kv.check_integrity()
        if not self._in_flight and not self._moves.ops and self.kv.num_draining:
            raise InternalError(f"{self.model}: {self.kv.num_draining} blocks drain for no step")
        if any(not self.kv.holds(r) for r in self.running) or any(self.kv.holds(r) for r in self.waiting):
            raise InternalError(f"{self.model}: the block tables are not those of the running requests")

    def _place(self, draft: Draft, request: Request, start: int, num_tokens: int) -> None:
        """Give a running request a row, preempting the last in order while memory is short."""
        if not num_tokens:
            return
        fence = self._fence(request) if request.num_in_flight_steps or self._moves.ops else None
        while (new := self.kv.allocate(request, start, num_tokens, fence)) is None:
            draft.short_of_memory = True
            victim = self.running[-1]
            if self.kv.num_draining or (victim is request and len(self.running) > 1):
                return  # blocks are about to come back, or earlier requests go on and this one waits with what it has
            if victim is request:
                with self.kv.quota.lifted():
                    new = self.kv.allocate(request, start, num_tokens, fence)
                if new is not None:
                    break
            if victim in draft.rows:
                draft.budget += draft.rows.pop(victim)[1]
            self._preempt(victim)
            if victim is request:
                return
        draft.rows[request] = (start, num_tokens, new)
        draft.budget -= num_tokens

    def _admit(self, draft: Draft) -> None:
        """Start waiting requests, in order, while they fit."""
        while self.waiting and len(self.running) < self.config.max_num_seqs and draft.budget and not draft.short_of_memory:
            request = self.waiting[0]
            if not draft.may_sample(request):
                return
            now = (request, self.kv.arena.num_releases, self._num_steps // RETRY_STEPS)
            if request.num_in_flight_steps or self._blocked == now:
                return
            row = self._try_admit(request, draft.budget)
            if row is None and not self.running and not self.kv.num_draining:
                self.kv.drop_cached()  # what is cached may lie so scattered that it keeps slabs from the group that needs one
                with self.kv.quota.lifted():
                    row = self._try_admit(request, draft.budget)
            if row is None:
                self._blocked = now
                return
            self.waiting.pop(0)
            insort(self.running, request, key=self._order_key)
            request.status = RequestStatus.RUNNING
            if request.times.first_scheduled_s is None:
                request.times.first_scheduled_s = self.clock()
                request.num_cached_tokens = row[0]
            request.num_computed_tokens = row[0]
            draft.rows[request] = row
            draft.budget -= row[1]

    def _try_admit(self, request: Request, budget: int) -> tuple[int, int, NewBlocks] | None:
        start = self.kv.get_computed(request)
        known = len(request.token_ids)
        growth = int(self._growth * sum(r.max_total_tokens - len(r.token_ids) for r in self.running))
        num_tokens = self._chunk(known - start, budget)
        if num_tokens and self.kv.could_hold(request, known + growth):
            new = self.kv.allocate(request, start, num_tokens, None)
            if new is not None:
                return start, num_tokens, new
        self.kv.free(request, None)
        return None

    def _chunk(self, remaining: int, budget: int) -> int:
        if not self.config.enable_chunked_prefill:
            return remaining if remaining <= budget else 0
        return min(remaining, budget, self.config.long_prefill_token_threshold or budget)

    def _commit(self, draft: Draft) -> Step:
        """Count the rows as in flight and write down what changed since the lane last heard."""
        lane, step_id = draft.lane, self._num_steps
        self._num_steps += 1
        output = SchedulerOutput(step_id, self.model, {}, finished_ids=self._finished_ids.pop(lane, []))
        has_windows = any(g.sliding_window is not None for g in self.kv.groups)
        rows: list[tuple[Request, int, bool, int]] = []
        for request, (start, num_tokens, new) in draft.rows.items():
            if request.lane == lane:
                freed = self.kv.num_dead(request) if has_windows and new is not NOTHING_NEW else ()
                output.cached_requests.append(CachedRequest(request.request_id, start, (), new, freed))
            else:
                self._forget(request)
                request.lane = lane
                output.new_requests.append(self._describe(request, start))
            samples = request.pooling_params is None and start + num_tokens == len(request.token_ids) + request.num_pending_samples
            if samples and request.grammar is not None:
                output.grammar_mask[request.request_id] = draft.masks[request]
            output.num_scheduled_tokens[request.request_id] = num_tokens
            request.num_in_flight_tokens += num_tokens
            request.num_in_flight_steps += 1
            request.num_pending_samples += samples
            request.last_step_id = step_id
            rows.append((request, num_tokens, samples, request.epoch))
        moves, self._moves = self._moves, Moves()
        output.kv_ops = moves.ops
        for request in moves.requests - draft.rows.keys():
            request.num_in_flight_steps += 1
            request.last_step_id = step_id
            rows.append((request, 0, False, request.epoch))
        step = self._in_flight[step_id] = Step(step_id, lane, output, rows, moves.drains, moves.requests)
        return step

    def _describe(self, request: Request, start: int) -> NewRequest:
        tokens, tables = list(request.token_ids), self.kv.tables(request)
        num_prompt, params = request.num_prompt_tokens, request.sampling_params
        adapter, eos, pooling = request.adapter_id, tuple(request.eos_token_ids), request.pooling_params
        return NewRequest(request.request_id, tokens, num_prompt, start, params, tables, adapter, eos, pooling)

    def _append(self, request: Request, tokens: list[int], now: float) -> list[int]:
        """Add sampled tokens up to the one that ends the request, if any; returns those added."""
        times = request.times
        if times.first_token_s is None:
            times.first_token_s = now
        times.last_token_s = now
        for count, token in enumerate(tokens, 1):
            self.metrics.generation_tokens += 1
            end = request.append(token)
            if end is not None:
                self.finish(request, *end)
                return tokens[:count]
        return tokens

    def _end(self, step: Step) -> None:
        del self._in_flight[step.step_id]
        self.kv.ended(step.drains)
        for request, _, samples, _ in step.rows:
            request.num_in_flight_steps -= 1
            request.num_pending_samples -= samples

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_up(request)
        request.pooled = None
        self._growth = min(1.0, self._growth + GROWTH_STEP)
        request.num_preemptions += 1
        self.metrics.num_preemptions += 1
        self._wait(request, RequestStatus.PREEMPTED)

    def _wait(self, request: Request, status: RequestStatus) -> None:
        request.status = status
        insort(self.waiting, request, key=self._order_key)

    def _give_up(self, request: Request) -> None:
        """Drop blocks and whatever a lane knows; steps in flight from before count for nothing but their samples."""
        self.kv.free(request, self._fence(request))
        self._moves.requests.discard(request)
        self._forget(request)
        request.epoch += 1
        request.num_computed_tokens = request.num_in_flight_tokens = 0

    def _fence(self, request: Request) -> Drains | None:
        if request in self._moves.requests:
            return self._moves.drains
        step = self._in_flight.get(request.last_step_id)
        return step.drains if step else None

    def _forget(self, request: Request) -> None:
        if request.lane != NO_LANE:
            self._finished_ids.setdefault(request.lane, []).append(request.request_id)
            request.lane = NO_LANE
