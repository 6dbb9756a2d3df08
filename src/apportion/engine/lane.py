"""A lane: an executor, the work it takes, and the steps it has in flight. It must not know how steps are chosen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from apportion.core.config import LaneConfig
from apportion.core.errors import ExecutorDied, InternalError
from apportion.core.schedule import ModelRunnerOutput
from apportion.engine.executor.executor import Executor
from apportion.engine.scheduler import Scheduler
from apportion.engine.step import Step

ExecutorFactory = Callable[[LaneConfig], Executor]
Ended = tuple[Scheduler, Step, ModelRunnerOutput]

MAX_DEATHS = 3  # in a row, without one step ending or one request being given up between them

_ids = count()


class Lane:
    """`lane_id` names one life of the executor: after a restart no request is known there any more.

    `submit`, `poll` and `restart` raise ExecutorDied.
    """

    def __init__(self, config: LaneConfig, make_executor: ExecutorFactory) -> None:
        self.config = config
        self.num_deaths = 0
        self._make_executor = make_executor
        self._start()

    def _start(self) -> None:
        self.lane_id = next(_ids)
        self.tickets: dict[int, tuple[Scheduler, Step]] = {}
        self.executor = self._make_executor(self.config)

    def serves(self, model: str) -> bool:
        return not self.config.models or model in self.config.models

    @property
    def has_room(self) -> bool:
        return len(self.tickets) < (self.config.depth or 1)

    def submit(self, scheduler: Scheduler, step: Step) -> None:
        self.tickets[-1] = (scheduler, step)  # in flight even if `submit` raises: nobody knows what the executor did with it
        ticket = self.executor.submit(step.output)
        self.tickets[ticket] = self.tickets.pop(-1)

    def poll(self, timeout_s: float) -> list[Ended]:
        ended: list[Ended] = []
        for ticket, output in self.executor.poll(timeout_s):
            if ticket not in self.tickets:
                raise InternalError(f"lane {self.config.name}: ticket {ticket} ended and was never handed out")
            ended.append((*self.tickets.pop(ticket), output))
            self.num_deaths = 0
        if not ended and not self.executor.is_alive:
            raise ExecutorDied(f"the executor of lane {self.config.name} ended without a report")
        return ended

    def take_tickets(self) -> dict[Scheduler, list[Step]]:
        """Give up every step in flight, in order, by scheduler."""
        steps: dict[Scheduler, list[Step]] = {}
        for scheduler, step in self.tickets.values():
            steps.setdefault(scheduler, []).append(step)
        self.tickets = {}
        return steps

    def restart(self) -> None:
        self.executor.shutdown()
        self._start()
