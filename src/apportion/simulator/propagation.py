"""From the configs of a strategy tree to a mesh and a partition for every operator, and to the storage of every tensor.

Three sources, the first that speaks wins: what is said at the operator itself; what the operators around it do (an unsplit axis of the
mesh follows the activations, forward then backward, until nothing changes); nothing, which means whole. What an ancestor says counts as
said for the dims it names. Every error names the path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from apportion.core.errors import InvalidParameter
from apportion.simulator.cluster import DeviceMesh
from apportion.simulator.layout import Box, Layout, Shard, split
from apportion.simulator.ops import Dim, Model, Op, Operand
from apportion.simulator.strategy_tree import Axes, Storage, StrategyTree

MAX_ROUNDS = 10
Intervals = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Placement:
    """Where an operator computes: per device its part of the iteration space."""

    parts: Mapping[str, Intervals]

    def layout(self, operand: Operand, shape: tuple[int, ...]) -> Layout:
        """Of an operand; devices whose parts differ in dims that the operand lacks hold different terms (meaningful for outputs)."""
        lacking = [name for name in next(iter(self.parts.values())) if name not in operand.dims]
        terms: dict[tuple[tuple[int, int], ...], int] = {}
        shards = []
        for device, part in self.parts.items():
            box = tuple((0, extent) if name is None else part[name] for name, extent in zip(operand.dims, shape, strict=True))
            key = tuple(part[name] for name in lacking)
            shards.append(Shard(device, box, terms.setdefault(key, len(terms))))
        return Layout(tuple(shards))

    def needed(self, operand: Operand, shape: tuple[int, ...]) -> Layout:
        return self.layout(operand, shape).summed()


@dataclass
class OpConfig:
    """said: dims that the user decided; the operator's own, or its ancestors'. fixed: said at the operator itself, nothing is to follow."""

    mesh: DeviceMesh
    partition: dict[str, Axes]
    said: frozenset[str]
    fixed: bool
    memory: dict[str, Storage]
    recompute: str | None

    @property
    def used(self) -> set[str]:
        return {axis for axes in self.partition.values() for axis in axes}


def resolve(tree: StrategyTree) -> dict[str, OpConfig]:
    """Every operator's config. Error: InvalidParameter naming the path."""
    configs = {op.path: _from_tree(tree, op) for op in tree.model.ops.values()}
    for _ in range(MAX_ROUNDS):
        changed = [_follow(tree, configs, op, backward=False) for op in tree.model.ops.values()]
        changed += [_follow(tree, configs, op, backward=True) for op in reversed(tree.model.ops.values())]
        if not any(changed):
            break
    for op in tree.model.ops.values():
        _check(op, configs[op.path])
    return configs


def _from_tree(tree: StrategyTree, op: Op) -> OpConfig:
    mesh: DeviceMesh | None = None
    partition: dict[str, Axes] = {}
    memory: dict[str, Storage] = {}
    recompute: str | None = None
    nodes = tree.ancestry(op.path)
    for node in nodes:
        mesh = node.config.mesh or mesh
        partition |= {name: axes for name, axes in node.config.partition.items() if name in op.dims or node is nodes[-1]}
        memory |= node.config.memory
        if node.config.recompute and recompute is None:
            recompute = node.path
    if mesh is None:
        raise InvalidParameter(f"no mesh is said for {op.path!r} or anything above it")
    # what comes from above is a wish: axes that this operator's own words took, or that its mesh lacks, are not given twice
    own = nodes[-1].config.partition
    taken = {axis for axes in own.values() for axis in axes}
    kept = {}
    for name, axes in partition.items():
        kept[name] = axes if name in own else tuple(axis for axis in axes if axis in mesh.sizes and axis not in taken)
        if name in op.dims and op.dims[name][1] == Dim.OPAQUE and name not in own:
            kept[name] = ()
    return OpConfig(mesh, kept, frozenset(partition), bool(own), memory, recompute)


def _follow(tree: StrategyTree, configs: dict[str, OpConfig], op: Op, *, backward: bool) -> bool:
    """Give free dims the axes that all neighbours on one side give them. True: something changed."""
    config = configs[op.path]
    if config.fixed:
        return False
    changed = False
    for name, (extent, kind) in op.dims.items():
        if kind not in (Dim.BATCH, Dim.OTHER) or config.partition.get(name) or (name in config.said and name in config.partition):
            continue
        heard = _heard(tree, configs, op, name, backward)
        if len(heard) != 1:
            continue
        (axes,) = heard
        parts = math.prod(config.mesh.sizes.get(axis, 0) for axis in axes)
        if axes and not set(axes) & config.used and 0 < parts <= extent:
            config.partition[name] = axes
            changed = True
    return changed


def _heard(tree: StrategyTree, configs: dict[str, OpConfig], op: Op, name: str, backward: bool) -> set[Axes]:
    """The axes over which the neighbours cut what this operator calls `name`."""
    model, heard = tree.model, set()
    for operand in op.outputs if backward else op.inputs:
        if name not in operand.dims or (operand.tensor in model.tensors and model.tensors[operand.tensor].kind != "activation"):
            continue
        at = operand.dims.index(name)
        neighbours = model.consumers[operand.tensor] if backward else [model.producer[operand.tensor]]
        for path in neighbours:
            other = model.ops[path]
            for theirs in other.inputs if backward else other.outputs:
                if theirs.tensor == operand.tensor:
                    heard.add(configs[path].partition.get(theirs.dims[at] or "", ()))
    return heard


def _check(op: Op, config: OpConfig) -> None:
    used: list[str] = []
    for name, axes in config.partition.items():
        if name not in op.dims:
            raise InvalidParameter(f"{op.path!r} has no dim {name!r}; it has {', '.join(op.dims)}")
        for axis in axes:
            if axis not in config.mesh.sizes:
                raise InvalidParameter(f"dim {name!r} of {op.path!r} is split over axis {axis!r}, which its mesh {config.mesh.sizes} lacks")
        extent, kind = op.dims[name]
        parts = math.prod(config.mesh.sizes[axis] for axis in axes)
        if parts > 1 and kind == Dim.OPAQUE:
            raise InvalidParameter(f"dim {name!r} of {op.path!r} ({op.kind}) cannot be split")
        if parts > extent:
            raise InvalidParameter(f"dim {name!r} of {op.path!r} has extent {extent}, which cannot be split into {parts} parts")
        used += axes
    if len(set(used)) != len(used):
        raise InvalidParameter(f"{op.path!r} splits two dims over one mesh axis: {config.partition}")


def stages_of(model: Model, configs: dict[str, OpConfig]) -> tuple[list[list[Op]], list[int]]:
    """Consecutive operators on the same devices are a stage; meshes that overlap are the same devices. And the pipeline rank of each."""
    groups: list[set[str]] = []
    for config in configs.values():
        mine = {device for device in config.mesh.devices if not device.startswith("cpu")} or set(config.mesh.devices)
        touched = [group for group in groups if group & mine]
        groups = [group for group in groups if not group & mine] + [mine.union(*touched)]
    stages: list[list[Op]] = []
    ranks: list[int] = []
    order: dict[int, int] = {}
    for op in model.ops.values():
        devices = set(configs[op.path].mesh.devices)
        at = next(i for i, group in enumerate(groups) if group & devices)
        rank = order.setdefault(at, len(order))
        if not ranks or ranks[-1] != rank:
            stages.append([])
            ranks.append(rank)
        stages[-1].append(op)
    return stages, ranks


def place(op: Op, config: OpConfig, micro_batch: int, num_micro_batches: int) -> Placement:
    """The parts of one micro-batch, in coordinates of the whole batch. Error: InvalidParameter where the batch does not divide."""
    parts = {}
    for i, device in enumerate(config.mesh.devices):
        part = {}
        for name, (extent, kind) in op.dims.items():
            whole = (0, extent)
            if kind == Dim.BATCH and num_micro_batches > 1:
                if extent % num_micro_batches:
                    raise InvalidParameter(f"the batch of {extent} at {op.path!r} cannot be cut into {num_micro_batches} micro-batches")
                whole = split(whole, num_micro_batches, micro_batch)
            part[name] = cut(op.path, name, whole, config.partition.get(name, ()), config.mesh, i)
        parts[device] = part
    return Placement(parts)


def cut(path: str, name: str, whole: tuple[int, int], axes: Axes, mesh: DeviceMesh, index: int) -> tuple[int, int]:
    """The piece of an interval that the index-th device has: cut by the first axis, that piece by the next, so that uneven parts nest."""
    coordinates = mesh.coordinates(index)
    parts = math.prod(mesh.sizes[axis] for axis in axes)
    if parts > whole[1] - whole[0]:
        raise InvalidParameter(f"dim {name!r} of {path!r} has extent {whole[1] - whole[0]} here, which cannot be split into {parts} parts")
    for axis in axes:
        whole = split(whole, mesh.sizes[axis], coordinates[axis])
    return whole


def stored(path: str, operand: Operand, natural: Layout, config: OpConfig, storage: Storage | None, shape: tuple[int, ...]) -> Layout:
    """Where a tensor is kept, given where its operator has it (`natural`) and a memory config of that operator."""
    if storage is None:
        return natural
    mesh = storage.mesh or config.mesh
    dims = dict((storage.dims or {}).items())
    for name, axes in dims.items():
        if name not in operand.dims:
            raise InvalidParameter(f"what {path!r} stores has no dim {name!r}; it has {[n for n in operand.dims if n]}")
        if unknown := [axis for axis in axes if axis not in mesh.sizes]:
            raise InvalidParameter(f"{path!r} stores dim {name!r} over axes {unknown}, which the mesh {mesh.sizes} lacks")
    if storage.dims is None:
        dims = {name: axes for name, axes in config.partition.items() if name in operand.dims}
        dims = {name: tuple(axis for axis in axes if axis in mesh.sizes) for name, axes in dims.items()}
    if storage.shard:
        dims |= _sharded(path, operand, dims, storage.shard, mesh, shape)
    whole = {name: interval for name, interval in zip(operand.dims, _hull(natural), strict=True) if name is not None}
    shards = []
    for i, device in enumerate(mesh.devices):
        box: Box = tuple(
            (0, extent) if name is None else cut(path, name, whole[name], dims.get(name, ()), mesh, i)
            for name, extent in zip(operand.dims, shape, strict=True)
        )
        shards.append(Shard(device, box))
    return Layout(tuple(shards))


def _sharded(
    path: str, operand: Operand, dims: Mapping[str, Axes], extra: Axes, mesh: DeviceMesh, shape: tuple[int, ...]
) -> dict[str, Axes]:
    """Add axes to the first dim whose pieces are long enough; none is (a short bias): the tensor stays as it is."""
    if unknown := [axis for axis in extra if axis not in mesh.sizes]:
        raise InvalidParameter(f"{path!r} is sharded over axes {unknown}, which its mesh {mesh.sizes} lacks")
    if {axis for axes in dims.values() for axis in axes} & set(extra):
        raise InvalidParameter(f"{path!r} is already split over {list(extra)}, over which its storage is to be sharded")
    for name, extent in zip(operand.dims, shape, strict=True):
        axes = (*dims.get(name or "", ()), *extra)
        if name is not None and math.prod(mesh.sizes[axis] for axis in axes) <= extent:
            return {name: axes}
    return {}


def _hull(layout: Layout) -> list[tuple[int, int]]:
    boxes = list(layout.by_box)
    return [(min(box[i][0] for box in boxes), max(box[i][1] for box in boxes)) for i in range(len(boxes[0]))]
