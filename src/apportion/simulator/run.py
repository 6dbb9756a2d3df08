"""The face of the simulator: a graph and a cluster in, a result out. `simulate` compiles nothing and decides nothing; it runs the parts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.simulator.cost.model import CostModel
from apportion.simulator.execution_graph import COMPUTE, ExecutionGraph
from apportion.simulator.htae import Behaviour, Cost, Timeline, execute
from apportion.simulator.memory import DeviceMemory, Overheads, memory_of

NUM_DRAWS = 16
BAND = (0.1, 0.9)


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one device; they sum to the step. exposed: it communicates and computes nothing; host: launching; bubble: it waits."""

    compute: float
    exposed_communication: float
    bubble: float
    host: float


@dataclass(frozen=True)
class Result:
    """seconds: of a step. band: its 10th and 90th percentile, from the spreads of the costs. throughput: samples/s (batch / seconds).

    peak_bytes, verdict: per device. sources: where costs came from -> share of the summed time. samples: step times of the drawn costs, one
    seed for all results, so that two results can be compared draw by draw.
    """

    name: str
    seconds: float
    band: tuple[float, float]
    throughput: float
    peak_bytes: Mapping[str, float]
    verdict: Mapping[str, str]
    breakdown: Mapping[str, Breakdown]
    sources: Mapping[str, float]
    num_tasks: int
    samples: tuple[float, ...]
    graph: ExecutionGraph = field(repr=False)
    timeline: Timeline = field(repr=False)
    memory: Mapping[str, DeviceMemory] = field(repr=False)

    @property
    def fits(self) -> bool:
        return "out of memory" not in self.verdict.values()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but graph and timeline."""
        data = {
            k: getattr(self, k) for k in ("name", "seconds", "band", "throughput", "peak_bytes", "verdict", "sources", "num_tasks", "fits")
        }
        worst = max(self.memory.values(), key=lambda m: m.peak)
        return data | {
            "breakdown": {device: asdict(b) for device, b in self.breakdown.items()},
            "memory_at_peak": {"device": worst.device} | dict(worst.categories),
        }


def simulate(
    graph: ExecutionGraph,
    model: CostModel,
    *,
    costs: Sequence[Cost] | None = None,
    behaviour: Behaviour | None = None,
    overheads: Overheads | None = None,
    batch: int = 1,
    num_draws: int = NUM_DRAWS,
    margin: float = 0.05,
    outside_s: float = 0.0,
    name: str = "",
) -> Result:
    """One step of the graph on the model's cluster. costs: of its tasks, where they are known already; None: the model's.

    num_draws: executions with drawn costs for the band; 0: none. margin: share of a device's memory within which a verdict is uncertain.
    outside_s: of every step, outside the graph (data, the optimizer's host work): it counts as host.

    Errors: Unsupported for an operator without a cost; InvalidParameter for a deadlock or devices that are not connected.
    """
    if num_draws < 0:
        raise InvalidParameter(f"num_draws must be at least 0, got {num_draws}")
    missing = [d for d in graph.devices if d not in model.topology.kinds and not d.startswith("cpu:")]
    if missing:
        raise InvalidParameter(f"the strategy uses device {missing[0]!r}, which the cluster does not have")
    behaviour = behaviour or Behaviour()
    costs, capacity = model.costs(graph) if costs is None else costs, model.topology.capacity
    timeline = execute(graph, costs, capacity, behaviour)
    samples = tuple(execute(graph, drawn, capacity, behaviour).seconds + outside_s for drawn in _draws(graph, costs, num_draws))
    seconds = timeline.seconds + outside_s
    memory = memory_of(graph, timeline, overheads)
    sums: dict[str, float] = {}
    for cost in costs:
        sums[cost.source] = sums.get(cost.source, 0.0) + cost.total
    total = sum(sums.values()) or 1.0
    return Result(
        name=name or graph.model,
        seconds=seconds,
        band=_band(samples, seconds),
        throughput=batch / seconds if seconds else 0.0,
        peak_bytes={d: m.peak for d, m in memory.items()},
        verdict={d: m.verdict(model.topology.kinds[d].mem_bytes, margin) for d, m in memory.items() if d in model.topology.kinds},
        breakdown=breakdown(graph, timeline, behaviour.launch_s, outside_s),
        sources={source: share / total for source, share in sorted(sums.items(), key=lambda item: -item[1])},
        num_tasks=len(graph.tasks),
        samples=samples,
        graph=graph,
        timeline=timeline,
        memory=memory,
    )


def _draws(graph: ExecutionGraph, costs: Sequence[Cost], count: int) -> list[list[Cost]]:
    """One error per kind of work (operator kind, or collective), as wrong costs are wrong together; the same draws for every graph."""
    drawn = []
    for i in range(count):
        factors: dict[str, float] = {}
        sample = []
        for task, cost in zip(graph.tasks, costs, strict=True):
            kind = graph.ops[task.op].kind if task.op else task.kind
            if kind not in factors:
                factors[kind] = random.Random(f"{i}:{kind}").gauss(0.0, 1.0)
            factor = max(0.2, 1 + factors[kind] * cost.spread)
            sample.append(replace(cost, seconds=cost.seconds * factor, wire_bytes=cost.wire_bytes * factor) if cost.spread else cost)
        drawn.append(sample)
    return drawn


def _band(samples: Sequence[float], seconds: float) -> tuple[float, float]:
    if not samples:
        return seconds, seconds
    ordered = sorted(samples)
    low, high = (ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in BAND)
    return min(low, seconds), max(high, seconds)


def breakdown(graph: ExecutionGraph, timeline: Timeline, launch_s: float = 0.0, outside_s: float = 0.0) -> dict[str, Breakdown]:
    """Where each device's time goes."""
    computing: dict[str, list[tuple[float, float]]] = {device: [] for device in graph.devices}
    talking: dict[str, list[tuple[float, float]]] = {device: [] for device in graph.devices}
    for task in graph.tasks:
        where = computing if task.kind == COMPUTE or task.stream == COMPUTE else talking
        for device in task.devices:
            where.setdefault(device, []).append((timeline.start[task.id], timeline.end[task.id]))
    found = {}
    for device in graph.devices:
        busy = _length(computing[device])
        either = _length(computing[device] + talking[device])
        host = min(busy, launch_s * len(computing[device]))
        inner = min(busy - host, graph.inner_communication.get(device, 0.0))
        found[device] = Breakdown(busy - host - inner, either - busy + inner, timeline.seconds - either, host + outside_s)
    return found


def _length(intervals: list[tuple[float, float]]) -> float:
    """Of the union."""
    total, reached = 0.0, float("-inf")
    for low, high in sorted(intervals):
        if high > reached:
            total += high - max(low, reached)
            reached = high
    return total


def faster(a: Result, b: Result) -> float:
    """The share of draws in which a is faster than b: near 0 or 1 the order is sure, near 0.5 it is inside the band."""
    if len(a.samples) != len(b.samples) or not a.samples:
        raise InvalidParameter("two results can be compared only if both were drawn equally often")
    return sum((x < y) + 0.5 * (x == y) for x, y in zip(a.samples, b.samples, strict=True)) / len(a.samples)
