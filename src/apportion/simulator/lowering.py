"""Writes tasks and buffers into an execution graph: operators in parts, moves between layouts, buckets. Decides nothing about order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from apportion.simulator.execution_graph import COMPUTE, Buffer, ExecutionGraph, Piece, Task, View
from apportion.simulator.layout import Box, Distance, Layout, Shard, Step, Transfer, transform
from apportion.simulator.ops import Dim, Op, Operand
from apportion.simulator.propagation import Placement

MB = 1e6
FIRST_BUCKET_MB = 1.0


@dataclass(frozen=True)
class Value:
    """A tensor on devices: its layout, and the view of each device's shard."""

    layout: Layout
    views: Mapping[str, View]
    tensor: str
    itemsize: int

    def narrowed(self, layout: Layout) -> Value:
        """The same memory seen under a layout whose boxes lie inside."""
        return replace(self, layout=layout, views={s.device: View(self.views[s.device].buffer, s.box) for s in layout.shards})


@dataclass
class Message:
    """A communication that is not yet in the graph: it may be fused with others."""

    kind: str
    devices: tuple[str, ...]
    stream: str
    pieces: list[Piece]
    num_bytes: int
    name: str
    after: frozenset[int] = frozenset()
    receivers: tuple[str, ...] = ()


@dataclass
class Lowering:
    """phase, stage, micro_batch: of whatever is written next. history: compute tasks of the latest operators, device -> task.

    lazy: tasks that whatever is written next waits for; barrier: the same for compute tasks, per device.
    """

    graph: ExecutionGraph
    distance: Distance
    phase: str = "forward"
    stage: int = 0
    micro_batch: int | None = None
    lazy: frozenset[int] = frozenset()
    barrier: dict[str, frozenset[int]] = field(default_factory=dict)
    history: list[dict[str, int]] = field(default_factory=list)
    readers: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    writers: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def buffer(self, tensor: str, device: str, box: Box, itemsize: int, kind: str, in_place_of: int | None = None) -> View:
        buffer = Buffer(len(self.graph.buffers), tensor, device, box, itemsize, kind, self.micro_batch, in_place_of)
        self.graph.buffers.append(buffer)
        return View(buffer.id, box)

    def initial(self, tensor: str, layout: Layout, itemsize: int, kind: str) -> Value:
        """A value that is there from the start."""
        views = {s.device: self.buffer(tensor, s.device, s.box, itemsize, kind) for s in layout.shards}
        return Value(layout, views, tensor, itemsize)

    def compute(
        self,
        op: Op,
        placement: Placement,
        inputs: Sequence[Value],
        outputs: Sequence[tuple[Layout, int, str]],
        in_place: Mapping[int, Value] | None = None,
    ) -> list[Value]:
        """One task per device. outputs: (layout, itemsize, buffer kind) of each; in_place: output -> value whose memory it takes over."""
        self.graph.ops.setdefault(op.path, op)
        results: list[dict[str, View]] = [{} for _ in outputs]
        issued = {}
        for device, part in placement.parts.items():
            reads = tuple(value.views[device] for value in inputs)
            for i, (layout, itemsize, kind) in enumerate(outputs):
                old = self._same_memory((in_place or {}).get(i), device, layout.of[device].box)
                results[i][device] = self.buffer(op.outputs[i].tensor, device, layout.of[device].box, itemsize, kind, old)
            piece = Piece(reads, tuple(result[device] for result in results))
            after = self.lazy | self.barrier.get(device, frozenset())
            issued[device] = self._task(COMPUTE, op.path, (device,), COMPUTE, [piece], after, op.path, part)
        self.history.append(issued)
        outs = zip(outputs, results, op.outputs, strict=True)
        return [Value(layout, views, operand.tensor, itemsize) for (layout, itemsize, _), views, operand in outs]

    def move(
        self, value: Value, target: Layout, kind: str, messages: list[Message], prefetch: int | None = None, over: Value | None = None
    ) -> Value:
        """The value in another layout; what has to be sent is appended to `messages` in order.

        kind: of the new buffers. prefetch: wait for the compute of this many operators ago. over: a value whose memory is taken over.
        """
        if value.layout == target:  # it may stay partial
            return value
        for step in transform(value.layout, target, self.distance):
            value = self.take(value, step, kind, messages, prefetch, over)
        return value.narrowed(target)

    def take(
        self, value: Value, step: Step, kind: str, messages: list[Message], prefetch: int | None = None, over: Value | None = None
    ) -> Value:
        """One step of a move."""
        layout, transfers = step
        views = {d: value.views[d] for d in layout.devices & value.layout.devices}
        fresh: dict[str, View] = {}
        for transfer in transfers:
            for device in dict.fromkeys(device for device, _ in transfer.receives):
                box = layout.of[device].box
                old = self._same_memory(over, device, box)
                if transfer.kind == "all_reduce" and self.graph.buffers[value.views[device].buffer].kind == "partial":
                    old = value.views[device].buffer
                if device not in fresh:
                    fresh[device] = self.buffer(value.tensor, device, box, value.itemsize, kind, old)
            sends = tuple(View(value.views[device].buffer, box) for device, box in transfer.sends)
            piece = Piece(sends, tuple(View(fresh[device].buffer, box) for device, box in transfer.receives))
            stream = self._stream(transfer, prefetch is not None)
            after = self._earlier(transfer.devices, prefetch) if prefetch is not None else self.lazy
            size, receivers = transfer.volume * value.itemsize, tuple(device for device, _ in transfer.receives)
            messages.append(Message(transfer.kind, transfer.devices, stream, [piece], size, value.tensor, after, receivers))
        kept = {s.device: View(views[s.device].buffer, s.box) for s in layout.shards if s.device not in fresh}
        return replace(value, layout=layout, views={**kept, **fresh})

    def send(self, messages: Iterable[Message]) -> None:
        for m in _all_to_all(list(messages)):
            self._task(m.kind, m.name, m.devices, m.stream, m.pieces, m.after, num_bytes=m.num_bytes)

    def add(self, name: str, a: Value, b: Value, kind: str, in_place: bool) -> Value:
        """The sum of two values of one layout, term by term."""
        extents = [max(s.box[i][1] for s in a.layout.shards) for i in range(len(a.layout.shards[0].box))]
        dims = [f"d{i}" for i in range(len(extents))]
        operand = Operand(a.tensor, tuple(dims))
        op = Op(name, "add", {d: (extent, Dim.OTHER) for d, extent in zip(dims, extents, strict=True)}, (operand, operand), (operand,))
        placement = boxes_as_parts(a.layout, dims)
        return self.compute(op, placement, [a, b], [(a.layout, a.itemsize, kind)], {0: a} if in_place else None)[0]

    def _task(
        self,
        kind: str,
        name: str,
        devices: tuple[str, ...],
        stream: str,
        pieces: list[Piece],
        after: frozenset[int],
        op: str | None = None,
        part: Mapping[str, tuple[int, int]] | None = None,
        num_bytes: int = 0,
    ) -> int:
        id = len(self.graph.tasks)
        overwritten = [self.graph.buffers[view.buffer].in_place_of for piece in pieces for view in piece.writes]
        for piece in pieces:
            for view in piece.reads:
                self.readers[view.buffer].add(id)
            for view in piece.writes:
                self.writers[view.buffer].add(id)
        waits = set(after).union(*(self.readers[old] for old in overwritten if old is not None)) - {id}
        self.graph.tasks.append(
            Task(
                id, kind, name, devices, stream, self.phase, self.stage, self.micro_batch, tuple(pieces), tuple(sorted(waits)), op,
                dict(part or {}), num_bytes,
            )
        )  # fmt: skip
        return id

    def _same_memory(self, old: Value | None, device: str, box: Box) -> int | None:
        """The buffer to be taken over on a device, if it is exactly as large."""
        if old is None or device not in old.views:
            return None
        buffer = self.graph.buffers[old.views[device].buffer]
        return buffer.id if buffer.box == box and buffer.itemsize == old.itemsize else None

    def _earlier(self, devices: Sequence[str], places: int) -> frozenset[int]:
        if len(self.history) < places:
            return frozenset()
        return frozenset(task for device, task in self.history[-places].items() if device in devices)

    def _stream(self, transfer: Transfer, prefetch: bool) -> str:
        if transfer.kind == "copy":
            return COMPUTE
        if any(device.startswith("cpu") for device, _ in transfer.sends):
            return "h2d"
        if any(device.startswith("cpu") for device, _ in transfer.receives):
            return "d2h"
        return "prefetch" if prefetch else "feature"


def boxes_as_parts(layout: Layout, dims: Sequence[str]) -> Placement:
    return Placement({s.device: dict(zip(dims, s.box, strict=True)) for s in layout.shards})


def _all_to_all(messages: list[Message]) -> list[Message]:
    """Scatters whose roots are, together, all members of one group are one all-to-all; so are gathers. Its size: the largest root's."""
    families: dict[tuple[str, frozenset[str]], list[Message]] = defaultdict(list)
    for message in messages:
        if message.kind in ("scatter", "gather"):
            families[message.kind, frozenset(message.devices)].append(message)
    fused: dict[int, Message | None] = {}
    for (_kind, group), family in families.items():
        sizes: dict[str, int] = defaultdict(int)
        for message in family:
            sizes[_root(message)] += message.num_bytes
        if set(sizes) == group:
            fused.update({id(message): None for message in family})
            pieces = [piece for message in family for piece in message.pieces]
            first = family[0]
            after = frozenset[int]().union(*(message.after for message in family))
            name = f"{first.name} and {len(family) - 1} more"
            fused[id(family[-1])] = Message("all_to_all", tuple(sorted(group)), first.stream, pieces, max(sizes.values()), name, after)
    done = [fused.get(id(message), message) for message in messages]
    return [message for message in done if message is not None]


def _root(message: Message) -> str:
    return message.devices[0] if message.kind == "scatter" else message.receivers[0]


class Buckets:
    """Gradient messages of one stage, kind and group, reduced together; a bucket closes when it exceeds its cap, the first 1 MB (DDP)."""

    def __init__(self, lowering: Lowering, cap_mb: float) -> None:
        self.lowering, self.cap_mb = lowering, cap_mb
        self.open: dict[tuple[int, str, tuple[str, ...], str], Message] = {}
        self.closed: set[tuple[int, str, tuple[str, ...], str]] = set()

    def put(self, messages: Iterable[Message]) -> None:
        for message in messages:
            stream = "gradient" if message.stream == "feature" else message.stream
            key = (self.lowering.stage, message.kind, message.devices, stream)
            bucket = self.open.setdefault(key, Message(message.kind, message.devices, stream, [], 0, f"bucket of {message.name}"))
            bucket.pieces += message.pieces
            bucket.num_bytes += message.num_bytes
            if bucket.num_bytes > MB * (self.cap_mb if key in self.closed else min(self.cap_mb, FIRST_BUCKET_MB)):
                self.closed.add(key)
                self.lowering.send([self.open.pop(key)])

    def flush(self, stage: int | None = None) -> None:
        """Send what a stage (all of them, if none is named) has put; its next bucket is a first one again."""
        mine = [key for key in self.open if stage in (None, key[0])]
        self.lowering.send([self.open.pop(key) for key in mine])
        self.closed = {key for key in self.closed if stage is not None and key[0] != stage}


def union(values: Sequence[Value]) -> Value | None:
    """Contributions on separate devices as one value with the terms of all; None where devices or boxes do not allow it."""
    first = values[0]
    shards: list[Shard] = []
    views: dict[str, View] = {}
    offset = 0
    for value in values:
        if set(value.layout.by_box) != set(first.layout.by_box) or views.keys() & value.views.keys():
            return None
        shards += [replace(s, term=s.term + offset) for s in value.layout.shards]
        views.update(value.views)
        offset += value.layout.num_terms
    return replace(first, layout=Layout(tuple(shards)), views=views)
