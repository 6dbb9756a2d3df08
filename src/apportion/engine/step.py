"""A step, while it is composed and until it has ended: what the scheduler must remember of it beside the message that is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from apportion.core.errors import InvalidInput
from apportion.core.request import Request
from apportion.core.schedule import SchedulerOutput
from apportion.kvcache.kv_cache_manager import Drains, NewBlocks

MASK_PATIENCE_S = 0.001  # how long a step waits for the masks of its grammars; who has none by then is left out of it


@dataclass(slots=True, eq=False)
class Draft:
    """A step being composed. rows: request -> (start, tokens, new blocks), in batch order. masks: of requests that follow a grammar.

    failed: whose grammar has given up, and why.
    """

    lane: int
    budget: int
    clock: Callable[[], float]
    rows: dict[Request, tuple[int, int, NewBlocks]] = field(default_factory=dict)
    short_of_memory: bool = False
    masks: dict[Request, bytes] = field(default_factory=dict)
    failed: dict[Request, str] = field(default_factory=dict)
    _mask_deadline: float | None = None

    def may_sample(self, request: Request) -> bool:
        """Whether a row may give the request a token: under a grammar only with a mask, which takes knowing the token before."""
        if request.grammar is None or request in self.masks:
            return True
        if request.num_pending_samples or request in self.failed:
            return False
        now = self.clock()
        if self._mask_deadline is None:
            self._mask_deadline = now + MASK_PATIENCE_S
        try:
            mask = request.grammar.mask(max(0.0, self._mask_deadline - now))
        except InvalidInput as error:
            self.failed[request] = str(error)
            return False
        if mask is not None:
            self.masks[request] = mask
        return mask is not None


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
