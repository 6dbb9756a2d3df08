"""A request as the control plane sees it: tokens, counts, state. Owned by the scheduler of its model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto

from apportion.core.sampling_params import SamplingParams


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
    finish_reason: "stop", "length", "abort" or "error"; stop_reason: the token id or string that stopped it.
    """

    request_id: str
    model: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    adapter_id: int | None = None
    tenant: str = ""  # salt of the prefix cache
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
    times: RequestTimes = field(default_factory=RequestTimes)

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

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED
