"""A step between `schedule` and `update`: what the scheduler must remember of it beside the message that was sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from apportion.core.request import Request
from apportion.core.schedule import SchedulerOutput
from apportion.kvcache.kv_cache_manager import Drains


@dataclass(slots=True, eq=False)
class Step:
    """One step in flight. rows: (request, tokens, whether it samples, the request's epoch). drains: blocks kept back until it ends.

    moved: requests whose blocks this step moves; those it does not compute stand in `rows` with no tokens, so that they wait for it.
    """

    step_id: int
    lane: int
    output: SchedulerOutput
    rows: list[tuple[Request, int, bool, int]]
    drains: Drains = field(default_factory=list)
    moved: set[Request] = field(default_factory=set)
