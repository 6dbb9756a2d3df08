"""How a tensor lies on devices, and the collectives that turn one layout into another (Proteus, section 5.2). Knows boxes, not meshes.

A layout gives each device a box of the tensor and a TERM: the value at a point is the sum, over terms, of what any device holding that
point and term has. One term is an ordinary sharded or replicated tensor, more are partial sums. `transform` looks at boxes only, so that it
works between any two meshes; where no collective fits it sends the intersections point to point.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from apportion.core.errors import InvalidParameter

Box = tuple[tuple[int, int], ...]
Distance = Callable[[str, str], int]


def volume(box: Box) -> int:
    """Elements of a box; a scalar's box is () and has one."""
    return math.prod(high - low for low, high in box)


def intersect(a: Box, b: Box) -> Box | None:
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(low < high for low, high in both) else None


def contains(outer: Box, inner: Box) -> bool:
    return all(o[0] <= i[0] and i[1] <= o[1] for o, i in zip(outer, inner, strict=True))


def tiles(parts: Sequence[Box], whole: Box) -> bool:
    """The parts lie in the whole, apart from one another, and leave nothing out."""
    return (
        all(contains(whole, part) for part in parts)
        and sum(map(volume, parts)) == volume(whole)
        and not any(intersect(a, b) for a, b in itertools.combinations(parts, 2))
    )


def split(interval: tuple[int, int], parts: int, index: int) -> tuple[int, int]:
    """The index-th of `parts` pieces; the first `extent % parts` are one longer."""
    low, high = interval
    size, longer = divmod(high - low, parts)
    start = low + index * size + min(index, longer)
    return start, start + size + (index < longer)


@dataclass(frozen=True)
class Shard:
    device: str
    box: Box
    term: int = 0


@dataclass(frozen=True)
class Layout:
    """At most one shard per device, in mesh order: collectives pair replicas by that order."""

    shards: tuple[Shard, ...]

    @cached_property
    def of(self) -> dict[str, Shard]:
        return {shard.device: shard for shard in self.shards}

    @cached_property
    def num_terms(self) -> int:
        return len({shard.term for shard in self.shards})

    @cached_property
    def by_box(self) -> dict[Box, tuple[Shard, ...]]:
        found: dict[Box, list[Shard]] = defaultdict(list)
        for shard in self.shards:
            found[shard.box].append(shard)
        return {box: tuple(shards) for box, shards in found.items()}

    @cached_property
    def devices(self) -> frozenset[str]:
        return frozenset(self.of)

    def summed(self) -> Layout:
        return Layout(tuple(Shard(shard.device, shard.box) for shard in self.shards))


@dataclass(frozen=True)
class Transfer:
    """One communication. sends: (device, what it contributes); receives: (device, what it has afterwards).

    all_reduce: everyone's box is the same. reduce_scatter: everyone sends the same box and keeps a tile of its sum. all_gather: everyone
    sends a tile and has them all. all_to_all: everyone sends to everyone what it needs. scatter, broadcast: one sends. gather: one
    receives. p2p: one to one. copy: inside a device.
    """

    kind: str
    sends: tuple[tuple[str, Box], ...]
    receives: tuple[tuple[str, Box], ...]

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(device for device, _ in (*self.sends, *self.receives)))

    @property
    def volume(self) -> int:
        """Elements of the message as its cost is counted: of a reduction or an all-gather the whole tensor of the group, of a broadcast or
        pair what arrives, of a scatter, gather or all-to-all what the busiest member exchanges with others."""
        if self.kind in ("all_reduce", "reduce_scatter"):
            return volume(self.sends[0][1])
        if self.kind in ("all_gather", "p2p", "copy", "broadcast"):
            return volume(self.receives[0][1])
        if self.kind == "gather":
            return sum(volume(box) for device, box in self.sends if device != self.receives[0][0])
        return max(self._sent_to_others(device, box) for device, box in self.sends)

    def _sent_to_others(self, device: str, box: Box) -> int:
        return sum(volume(part) for other, wanted in self.receives if other != device and (part := intersect(box, wanted)) is not None)


Step = tuple[Layout, list[Transfer]]


def transform(source: Layout, target: Layout, distance: Distance) -> list[Step]:
    """The steps from source to target: after each, the layout it leads to and what moves. None at all: every device has its box already."""
    if source.num_terms == 1:
        return _move(source, target, distance)
    first = reduce_step(source, target)
    return [first, *_move(first[0], target, distance)]


def reduce_step(source: Layout, target: Layout) -> Step:
    """Sum the terms: a reduce-scatter straight into the target where it tiles the groups, else an all-reduce where the source lies."""
    groups = list(_reduce_groups(source))
    if len({s.device for group in groups for s in group}) == len(source.shards) and source.devices == target.devices:
        wanted = [[target.of[shard.device].box for shard in group] for group in groups]
        if all(tiles(boxes, group[0].box) for boxes, group in zip(wanted, groups, strict=True)):
            return target, [_transfer("reduce_scatter", group, boxes) for group, boxes in zip(groups, wanted, strict=True)]
    transfers = [_transfer("all_reduce", group, [shard.box for shard in group]) for group in groups]
    members = {shard.device for group in groups for shard in group}
    return Layout(tuple(Shard(s.device, s.box) for s in source.shards if s.device in members)), transfers


def _transfer(kind: str, group: Sequence[Shard], boxes: Sequence[Box]) -> Transfer:
    return Transfer(kind, tuple((s.device, s.box) for s in group), tuple((s.device, box) for s, box in zip(group, boxes, strict=True)))


def _reduce_groups(source: Layout) -> Iterable[list[Shard]]:
    """One device per term and box; the i-th replicas of all terms together. Where terms have unequally many replicas, only the first."""
    for box, shards in source.by_box.items():
        terms: dict[int, list[Shard]] = defaultdict(list)
        for shard in shards:
            terms[shard.term].append(shard)
        if len(terms) != source.num_terms:
            raise InvalidParameter(f"box {box} lacks {source.num_terms - len(terms)} of the {source.num_terms} partial sums of its tensor")
        counts = {len(replicas) for replicas in terms.values()}
        for i in range(counts.pop() if len(counts) == 1 else 1):
            yield sorted((replicas[i] for replicas in terms.values()), key=source.shards.index)


def _move(source: Layout, target: Layout, distance: Distance) -> list[Step]:
    missing = [s for s in target.shards if s.device not in source.of or not contains(source.of[s.device].box, s.box)]
    if not missing:
        return []
    transfers = _all_gathers(source, target, missing)
    return [(target, transfers if transfers is not None else _exchanges(source, missing, distance))]


def _all_gathers(source: Layout, target: Layout, missing: list[Shard]) -> list[Transfer] | None:
    """All-gathers, if every box that is missing somewhere is tiled by what its own holders have."""
    transfers = []
    for box in dict.fromkeys(shard.box for shard in missing):
        holders = target.by_box[box]
        if any(shard.device not in source.of for shard in holders):
            return None
        tile_of: dict[Box, list[Shard]] = defaultdict(list)
        for shard in holders:
            mine = source.of[shard.device]
            tile_of[mine.box].append(mine)
        if not tiles(list(tile_of), box) or len({len(replicas) for replicas in tile_of.values()}) != 1:
            return None
        for group in zip(*tile_of.values(), strict=True):
            ordered = sorted(group, key=source.shards.index)
            transfers.append(_transfer("all_gather", ordered, [box] * len(ordered)))
    return transfers


def _exchanges(source: Layout, missing: list[Shard], distance: Distance) -> list[Transfer]:
    """Scatter, broadcast, gather or all-to-all per set of devices that talk to one another; otherwise point to point."""
    pieces = [piece for shard in missing for piece in _pieces(source, shard, missing, distance)]
    group_of: dict[str, set[str]] = {}
    for sender, receiver, _ in pieces:
        merged = group_of.get(sender, {sender}) | group_of.get(receiver, {receiver})
        group_of.update(dict.fromkeys(merged, merged))
    transfers = []
    for group in {id(g): g for g in group_of.values()}.values():
        inside = [piece for piece in pieces if piece[0] in group]
        transfers += _collective(source, [s for s in missing if s.device in group], inside)
    return transfers


def _pieces(source: Layout, wanted: Shard, missing: list[Shard], distance: Distance) -> Iterable[tuple[str, str, Box]]:
    """(sender, receiver, box) that fill one shard: from itself, else the nearest holder, else the replica of the same number."""
    twins = [s.device for s in missing if s.box == wanted.box]
    found = 0
    for box, holders in source.by_box.items():
        part = intersect(box, wanted.box)
        if part is None:
            continue
        turn = twins.index(wanted.device) % len(holders)
        nearest = min(range(len(holders)), key=lambda i: (distance(holders[i].device, wanted.device), (i - turn) % len(holders)))
        yield holders[nearest].device, wanted.device, part
        found += volume(part)
    if found != volume(wanted.box):
        raise InvalidParameter(
            f"device {wanted.device} needs {wanted.box}, of which the devices hold {found} of {volume(wanted.box)} elements"
        )


def _collective(source: Layout, wanted: list[Shard], pieces: list[tuple[str, str, Box]]) -> list[Transfer]:
    senders = list(dict.fromkeys(sender for sender, _, _ in pieces))
    receives = tuple((shard.device, shard.box) for shard in wanted)
    boxes = [shard.box for shard in wanted]
    apart = not any(intersect(a, b) for a, b in itertools.combinations(boxes, 2))
    if len(senders) == 1 and len(wanted) > 1 and (apart or len(set(boxes)) == 1):
        sent = source.of[senders[0]].box
        return [Transfer("scatter" if apart else "broadcast", ((senders[0], sent),), receives)]
    if len(wanted) == 1 and len(senders) > 1:
        return [Transfer("gather", tuple((sender, box) for sender, _, box in pieces), receives)]
    full = len(pieces) == len(wanted) ** 2 and set(senders) == {shard.device for shard in wanted}
    if len(wanted) > 1 and apart and full:
        return [Transfer("all_to_all", tuple((s.device, source.of[s.device].box) for s in wanted), receives)]
    return [Transfer("copy" if a == b else "p2p", ((a, box),), ((b, box),)) for a, b, box in pieces]
