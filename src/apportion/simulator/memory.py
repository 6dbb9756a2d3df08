"""Memory over time: every buffer from the start of what writes it to the end of what reads it last (Proteus, section 6.3).

Beside the graph's buffers a device holds what no strategy sees: the driver's context, the workspace of its libraries, the buffers of its
communicators, and what the allocator cannot use. Knows a graph and a timeline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from apportion.core.errors import InvalidParameter
from apportion.simulator.execution_graph import COMPUTE, Buffer, ExecutionGraph
from apportion.simulator.htae import Timeline

MB = 1e6
CATEGORIES = ("weight", "state", "grad", "activation", "temporary", "input", "workspace", "communicators", "context", "fragmentation")
CATEGORY = {"partial": "temporary", "gathered": "temporary"}  # of a buffer kind; the others are their own
# NCCL's buffers by ranks of a communicator (AIConfigurator h200_sxm.yaml, Apache-2.0): from 2 and from 4 ranks on.
COMMUNICATOR_BYTES = {2: 358_612_992, 4: 411_041_792}


@dataclass(frozen=True)
class Overheads:
    """Bytes per device that no buffer of the graph is. granularity: an allocation is a multiple of it; fragmentation: share of the rest.

    communicators: members -> bytes, for the largest communicator a device is in.
    """

    context: float = 500 * MB
    workspace: float = 70 * MB
    communicators: Mapping[int, float] = field(default_factory=lambda: dict(COMMUNICATOR_BYTES))
    granularity: int = 512
    fragmentation: float = 0.03

    def __post_init__(self) -> None:
        if min(self.context, self.workspace, self.fragmentation, *self.communicators.values()) < 0 or self.granularity < 1:
            raise InvalidParameter("overheads are bytes and a share: none can be negative, and granularity is at least 1")

    @classmethod
    def none(cls) -> Overheads:
        """Tensors alone: what a closed form counts."""
        return cls(0, 0, {}, 1, 0.0)


@dataclass(frozen=True)
class DeviceMemory:
    """curve: (seconds, bytes held from then on), of the buffers alone; peak and categories (at the peak) count everything, bytes."""

    device: str
    peak: float
    peak_at_s: float
    categories: Mapping[str, float]
    curve: tuple[tuple[float, float], ...]

    def verdict(self, capacity: float, margin: float = 0.05) -> str:
        """'fits', 'out of memory', or 'uncertain' where the peak is within the margin of the capacity."""
        if capacity <= 0:
            raise InvalidParameter(f"a device's memory must be positive, got {capacity:g} bytes")
        if self.peak <= capacity * (1 - margin):
            return "fits"
        return "out of memory" if self.peak > capacity * (1 + margin) else "uncertain"


def memory_of(graph: ExecutionGraph, timeline: Timeline, overheads: Overheads | None = None) -> dict[str, DeviceMemory]:
    """Per device."""
    overheads = overheads or Overheads()
    changes: dict[str, list[tuple[float, int, float, str]]] = defaultdict(list)
    for chain in _chains(graph):
        begin, end = _lifetime(graph, timeline, chain)
        size = -(-chain[0].num_bytes // overheads.granularity) * overheads.granularity
        category = CATEGORY.get(chain[0].kind, chain[0].kind)
        changes[chain[0].device].append((begin, 1, size, category))
        if end is not None:
            changes[chain[0].device].append((end, 0, -size, category))
    members: dict[str, int] = defaultdict(int, graph.group_sizes)
    for task in graph.tasks:
        if task.kind != COMPUTE:
            for device in task.devices:
                members[device] = max(members[device], len(task.devices))
    return {device: _follow(device, changes[device], members[device], overheads) for device in graph.devices}


def _chains(graph: ExecutionGraph) -> list[list[Buffer]]:
    """Buffers that take over one another's memory, first to last."""
    chain_of: dict[int, list[Buffer]] = {}
    chains = []
    for buffer in graph.buffers:
        if buffer.in_place_of is not None:
            chain_of[buffer.in_place_of].append(buffer)
            chain_of[buffer.id] = chain_of[buffer.in_place_of]
        else:
            chain_of[buffer.id] = [buffer]
            chains.append(chain_of[buffer.id])
    return chains


def _lifetime(graph: ExecutionGraph, timeline: Timeline, chain: list[Buffer]) -> tuple[float, float | None]:
    """(from, to); to None: it stays. Inputs are there from the start until they are read for the last time."""
    writers = [task for buffer in chain for task in graph.writers.get(buffer.id, ())]
    readers = [task for buffer in chain for task in graph.readers.get(buffer.id, ())]
    first = graph.writers.get(chain[0].id)
    begin = min(timeline.start[task] for task in first) if first else 0.0
    stays = any(b.kind in ("weight", "state") and not graph.writers.get(b.id) for b in chain) or any(b.id in graph.kept for b in chain)
    return begin, None if stays else max([timeline.end[task] for task in (*writers, *readers)], default=0.0)


def _follow(device: str, changes: list[tuple[float, int, float, str]], members: int, overheads: Overheads) -> DeviceMemory:
    held: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    total = peak = peak_at = 0.0
    at_peak = dict(held)
    curve: list[tuple[float, float]] = []
    for when, _, size, category in sorted(changes):  # at one moment what ends goes first
        held[category] += size
        total += size
        if curve and curve[-1][0] == when:
            curve[-1] = (when, total)
        else:
            curve.append((when, total))
        if total > peak:
            peak, peak_at, at_peak = total, when, dict(held)
    moving = peak - at_peak["weight"] - at_peak["state"]
    at_peak["fragmentation"] = moving * overheads.fragmentation
    at_peak["context"] = 0.0 if device.startswith("cpu") else overheads.context
    at_peak["workspace"] = 0.0 if device.startswith("cpu") else overheads.workspace
    at_peak["communicators"] = max((size for ranks, size in overheads.communicators.items() if members >= ranks), default=0.0)
    return DeviceMemory(device, sum(at_peak.values()), peak_at, at_peak, tuple(curve))
