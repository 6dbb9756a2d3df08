"""Which micro-batch of which stage each pipeline rank works on next: explicit lists, merged into one order. Knows no operators.

GPipe (arXiv:1811.06965), 1F1B (PipeDream-Flush, arXiv:2006.09503) and its interleaved form (arXiv:2104.04473, section 2.2). With equal
stages GPipe and 1F1B leave the same bubble (p - 1) / (m + p - 1); 1F1B holds p - rank micro-batches at most, `max_ongoing` any number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apportion.core.errors import InvalidParameter
from apportion.simulator.strategy_tree import Schedule

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Action:
    phase: str
    stage: int
    micro_batch: int


def actions_of(rank: int, stages: Sequence[int], num_ranks: int, schedule: Schedule) -> list[Action]:
    """What one rank, holding `stages` in model order, does in one step."""
    m = schedule.num_micro_batches
    if schedule.order == "interleaved" and len(stages) > 1:
        return _interleaved(rank, stages, num_ranks, m)
    limit = m if schedule.order == "gpipe" else num_ranks - rank
    if schedule.max_ongoing is not None:
        if len(schedule.max_ongoing) != num_ranks:
            raise InvalidParameter(f"max_ongoing has {len(schedule.max_ongoing)} numbers for {num_ranks} pipeline ranks")
        limit = schedule.max_ongoing[rank]
    if len(stages) > 1 and m > 1:
        if schedule.order != "gpipe":
            raise InvalidParameter(f"rank {rank} holds {len(stages)} stages: their order must be 'interleaved' or 'gpipe'")
        forward = [Action(FORWARD, s, i) for s in stages for i in range(m)]
        return forward + [Action(BACKWARD, s, i) for s in reversed(stages) for i in range(m)]
    done: list[Action] = []
    started = ended = 0
    while ended < m:
        forward_next = started < m and started - ended < limit
        phase, at = (FORWARD, started) if forward_next else (BACKWARD, ended)
        done += [Action(phase, s, at) for s in (stages if forward_next else reversed(stages))]
        started, ended = started + forward_next, ended + (not forward_next)
    return done


def _interleaved(rank: int, stages: Sequence[int], num_ranks: int, m: int) -> list[Action]:
    """Megatron's order: groups of num_ranks micro-batches pass chunk after chunk."""
    if m % num_ranks:
        raise InvalidParameter(f"interleaved stages need micro-batches in multiples of the {num_ranks} ranks, got {m}")
    chunks, total = len(stages), m * len(stages)
    warmup = min((num_ranks - rank - 1) * 2 + (chunks - 1) * num_ranks, total)

    def action(phase: str, i: int) -> Action:
        group, inside = divmod(i, num_ranks * chunks)
        chunk = inside // num_ranks
        return Action(phase, stages[chunk if phase == FORWARD else chunks - 1 - chunk], group * num_ranks + inside % num_ranks)

    done = [action(FORWARD, i) for i in range(warmup)]
    for i in range(total - warmup):
        done += [action(FORWARD, warmup + i), action(BACKWARD, i)]
    return done + [action(BACKWARD, i) for i in range(total - warmup, total)]


def merge(lists: Sequence[Sequence[Action]], needs: Callable[[Action], Sequence[Action]]) -> list[Action]:
    """One order that keeps each rank's list and starts nothing before what it needs.

    Error: InvalidParameter where the lists wait for one another, naming two ranks that do.
    """
    done: dict[Action, None] = {}
    at = [0] * len(lists)
    while any(i < len(actions) for i, actions in zip(at, lists, strict=True)):
        progress = False
        for rank, actions in enumerate(lists):
            if at[rank] < len(actions) and all(need in done for need in needs(actions[at[rank]])):
                done[actions[at[rank]]] = None
                at[rank] += 1
                progress = True
        if not progress:
            stuck = [(rank, actions[at[rank]]) for rank, actions in enumerate(lists) if at[rank] < len(actions)]
            rank, action = stuck[0]
            missing = next(need for need in needs(action) if need not in done)
            other = next((r for r, actions in enumerate(lists) if missing in actions), rank)
            raise InvalidParameter(
                f"the schedule deadlocks: rank {rank} waits at {action.phase} of stage {action.stage}, micro-batch {action.micro_batch},"
                f" for {missing.phase} of stage {missing.stage}, micro-batch {missing.micro_batch}, which rank {other} does not reach"
            )
    return list(done)
