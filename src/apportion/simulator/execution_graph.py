"""A distributed run as plain data: what every device computes, holds and sends, and in which order. Knows no times and makes no decisions.

Tasks stand in program order: each device issues its tasks of one stream in this order. What must REALLY come first is said by data (a task
reads views that others write) and by `after` (control edges: prefetch, lazy recompute, memory that is overwritten in place). Any order that
keeps these gives the same numbers; the executor may use it, the interpreter's tests draw such orders at random.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from apportion.core.errors import InternalError
from apportion.simulator.layout import Box, contains, volume
from apportion.simulator.ops import Op

COMPUTE = "compute"  # any other kind of task is a communication: the kinds of layout.Transfer, and all_to_all made of scatters
STREAMS = ("compute", "feature", "gradient", "prefetch", "h2d", "d2h")


@dataclass(frozen=True)
class Buffer:
    """Memory of one device that is written once. kind: input, weight, state (there from the start), activation, grad, gathered.

    in_place_of: the buffer whose memory this one takes over: whoever read that one is done (a control edge says so).
    """

    id: int
    tensor: str
    device: str
    box: Box
    itemsize: int
    kind: str
    micro_batch: int | None = None
    in_place_of: int | None = None

    @property
    def num_bytes(self) -> int:
        return volume(self.box) * self.itemsize


@dataclass(frozen=True)
class View:
    """A part of a buffer, in coordinates of the tensor."""

    buffer: int
    box: Box


@dataclass(frozen=True)
class Piece:
    """What a task reads and writes for one tensor; of a communication, in the order of its members."""

    reads: tuple[View, ...]
    writes: tuple[View, ...]


@dataclass(frozen=True)
class Task:
    """kind: 'compute' (then op and part say what) or the collective. pieces: one, or the tensors of a bucket.

    phase: forward, recompute, backward, optimizer. num_bytes: of a communication, the message as its collective counts it
    (`layout.Transfer.volume`), summed over the pieces.
    """

    id: int
    kind: str
    name: str
    devices: tuple[str, ...]
    stream: str
    phase: str
    stage: int
    micro_batch: int | None
    pieces: tuple[Piece, ...]
    after: tuple[int, ...] = ()
    op: str | None = None
    part: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    num_bytes: int = 0

    @property
    def reads(self) -> list[View]:
        return [view for piece in self.pieces for view in piece.reads]

    @property
    def writes(self) -> list[View]:
        return [view for piece in self.pieces for view in piece.writes]


@dataclass
class ExecutionGraph:
    """ops: every operator that tasks name, backward and optimizer ones too. results: tensor -> [(view, term)], what a run leaves:

    updated weights under their own name, summed gradients as 'grad:<weight>', and the outputs that nobody reads; a value that is still
    partial has several terms. Outputs are listed for every micro-batch.

    inner_communication: device -> seconds that tasks of kind 'compute' spend in communication they contain (stages as wholes). group_sizes:
    device -> members of the largest group it communicates in, where that is more than the tasks say.
    """

    model: str
    ops: dict[str, Op] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    results: dict[str, list[tuple[View, int]]] = field(default_factory=dict)
    inner_communication: dict[str, float] = field(default_factory=dict)
    group_sizes: dict[str, int] = field(default_factory=dict)

    @cached_property
    def writers(self) -> dict[int, list[int]]:
        """buffer -> tasks that fill it; those without are there from the start."""
        found: dict[int, list[int]] = defaultdict(list)
        for task in self.tasks:
            for view in task.writes:
                found[view.buffer].append(task.id)
        return found

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for task in self.tasks:
            for buffer in dict.fromkeys(view.buffer for view in task.reads):
                found[buffer].append(task.id)
        return found

    @cached_property
    def predecessors(self) -> list[frozenset[int]]:
        """Per task, what must have ended before it starts."""
        return [frozenset(w for view in t.reads for w in self.writers.get(view.buffer, ())) | frozenset(t.after) for t in self.tasks]

    @cached_property
    def kept(self) -> frozenset[int]:
        """Buffers that hold a result when the step ends, and stay: gradients too, as frameworks keep them."""
        return frozenset(view.buffer for parts in self.results.values() for view, _ in parts)

    @property
    def devices(self) -> list[str]:
        return sorted({buffer.device for buffer in self.buffers}, key=lambda name: (name.split(":")[0], int(name.split(":")[1])))

    def static_bytes(self, device: str) -> dict[str, int]:
        """kind -> bytes of what a device holds from step to step, and of the gradients at their end: weight, state, grad."""
        found: dict[str, int] = defaultdict(int)
        for buffer in self.buffers:
            if buffer.device == device and buffer.kind in ("weight", "state") and not self.writers.get(buffer.id):
                found[buffer.kind] += buffer.num_bytes
        for name, parts in self.results.items():
            for view in {view for view, _ in parts if name.startswith("grad:")}:
                if self.buffers[view.buffer].device == device:
                    found["grad"] += volume(view.box) * self.buffers[view.buffer].itemsize
        return dict(found)

    def check(self) -> None:
        """Program order keeps the edges, devices match, and nothing is read outside what was written. Error: InternalError."""
        for task in self.tasks:
            if any(p >= task.id for p in self.predecessors[task.id]):
                raise InternalError(f"task {task.id} ({task.name}) stands before a task it waits for")
            for view in (*task.reads, *task.writes):
                buffer = self.buffers[view.buffer]
                if not contains(buffer.box, view.box):
                    raise InternalError(f"task {task.id} ({task.name}) touches {view.box} of {buffer.tensor!r}, which has {buffer.box}")
                if buffer.device not in task.devices:
                    raise InternalError(f"task {task.id} ({task.name}) on {task.devices} touches {buffer.tensor!r} on {buffer.device}")
            if any(not self.writers.get(v.buffer) and self.buffers[v.buffer].kind not in ("input", "weight", "state") for v in task.reads):
                raise InternalError(f"task {task.id} ({task.name}) reads what nothing writes")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
