"""A request as the control plane sees it: tokens, counts, state. Owned by the scheduler of its model."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from enum import Enum, auto

from apportion.core.errors import InvalidInput
from apportion.core.grammar import Grammar
from apportion.core.pooling_params import PoolingParams
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import TokenLogprobs

NO_LANE = -1


class RequestStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(slots=True)
class RequestTimes:
    """Clock readings in seconds (time.monotonic, or the simulator's clock); None until it happened."""

    arrival_s: float = field(default_factory=time.monotonic)
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One sequence.

    token_ids: prompt followed by generated tokens. num_computed_tokens: tokens whose KV a finished step has stored.
    num_in_flight_tokens: tokens scheduled in steps that have not ended (asynchronous scheduling). num_pending_samples: tokens that those
    steps will sample, so that a decode can be scheduled before its input token is known here.
    grammar: what its text must follow, if anything. pooling_params: set where hidden states are wanted instead of tokens; `pooled` is then
    what the computed tokens have brought so far: their sum, or the one row asked for.
    finish_reason: "stop", "length", "abort" or "error"; stop_reason: the token id or string that stopped it (None for the end token).

    The last group is the scheduler's own. max_total_tokens: prompt and output together. epoch: raised whenever the request's blocks are
    given up, so that a step in flight from before does not count as computed. lane: the one that knows the request, or NO_LANE.
    """

    request_id: str
    model: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    adapter_id: int | None = None
    tenant: str = ""  # salt of the prefix cache
    grammar: Grammar | None = None
    pooling_params: PoolingParams | None = None
    token_ids: list[int] = field(init=False)
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_pending_samples: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at first admission
    num_preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    pooled: list[float] | None = None
    times: RequestTimes = field(default_factory=RequestTimes)
    max_total_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    arrival_index: int = 0
    epoch: int = 0
    lane: int = NO_LANE
    num_in_flight_steps: int = 0
    last_step_id: int = -1
    num_replays: int = 0
    num_prompt_logprobs: int = 0  # told so far: a recomputed prompt yields them again

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]

    def append(self, token: int) -> tuple[str, int | None, str | None] | None:
        """Take in a sampled token; returns how it ends the request, if it does: (finish_reason, stop_reason, error)."""
        self.token_ids.append(token)
        params = self.sampling_params
        if token in self.stop_ids and self.num_output_tokens >= params.min_tokens:
            return "stop", token if token in (params.stop_token_ids or ()) else None, None
        if self.grammar is not None:
            try:
                self.grammar.accept(token)
                if self.grammar.is_finished:
                    return "stop", None, None
            except InvalidInput as error:
                return "error", None, str(error)
        return ("length", None, None) if len(self.token_ids) >= self.max_total_tokens else None

    def take_pooled(self, part: list[float] | None) -> bool:
        """Add a chunk's part to the hidden states asked for; True when the prompt is whole."""
        if part is not None:
            self.pooled = part if self.pooled is None else [a + b for a, b in zip(self.pooled, part, strict=True)]
        return self.num_computed_tokens >= self.num_prompt_tokens

    @property
    def embedding(self) -> list[float] | None:
        """What pooling_params ask for, once all of the prompt is computed."""
        params, pooled = self.pooling_params, self.pooled
        if params is None or pooled is None or self.finish_reason != "stop":
            return None
        length = math.hypot(*pooled) if params.normalize else self.num_prompt_tokens if params.pooling_type == "mean" else 1.0
        return [value / (length or 1.0) for value in pooled]

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED


@dataclass(slots=True, frozen=True)
class RequestUpdate:
    """What one step brought a request: tokens, their log-probabilities, and (in `request`) whether and why it is finished."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
