"""What a user decides, as configs on the tree of operator paths (Proteus, section 4). Knows names; `propagation` gives them meaning.

    tree = StrategyTree(model)
    tree.at("").map(mesh).split(b="dp")                        # the root: data parallelism
    tree.at("layers.*.mlp.up").split(f="tp")                   # column parallel; what is unsaid comes from above
    tree.at("").shard("optimizer", "dp")                       # ZeRO-1
    tree.at("layers.*").recompute()
    tree.schedule(num_micro_batches=8, order="1f1b")

Three kinds of config, as in the paper: computation (`map` to a mesh, `split` iteration dims over its axes), memory (`store` or `shard` a
weight, its gradient, the optimizer's state or an output elsewhere than where it is computed), schedule. Deeper nodes overrule higher ones,
later calls earlier ones. In a glob '*' is one word of a path (or part of one), '**' any number of words.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from apportion.core.errors import InvalidParameter
from apportion.simulator.cluster import DeviceMesh
from apportion.simulator.ops import Model

Axes = tuple[str, ...]
# weight: where parameters live between uses; grad: where their sums end up; optimizer: where the update runs and its state lives;
# out: where an operator's output is kept.
ITEMS = ("weight", "grad", "optimizer", "out")
ORDERS = ("1f1b", "gpipe", "interleaved")


@dataclass(frozen=True)
class Storage:
    """A memory config. mesh None: the mesh of the computation. dims: dim -> axes, in place of the computation's; None keeps those.

    shard: axes to add to the first dim that can take them (ZeRO).
    """

    mesh: DeviceMesh | None = None
    dims: Mapping[str, Axes] | None = None
    shard: Axes = ()


@dataclass
class Config:
    """What is said at one node. A dim with no axes is said to be whole."""

    mesh: DeviceMesh | None = None
    partition: dict[str, Axes] = field(default_factory=dict)
    memory: dict[str, Storage] = field(default_factory=dict)
    recompute: bool = False


@dataclass
class Node:
    path: str
    config: Config = field(default_factory=Config)
    children: dict[str, Node] = field(default_factory=dict)
    is_op: bool = False

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            yield from child.walk()


@dataclass(frozen=True)
class Schedule:
    """max_ongoing: per pipeline rank, the micro-batches whose forward is done and backward is not; None: what the order says."""

    num_micro_batches: int = 1
    order: str = "1f1b"
    max_ongoing: tuple[int, ...] | None = None


class StrategyTree:
    """bucket_mb: gradients of one group are reduced together until a bucket exceeds this, the first bucket 1 MB (as DDP); MB = 10^6 bytes.

    prefetch: parameters stored elsewhere are fetched while the operator this many places earlier still runs. optimizer_overlap: a weight is
    updated as soon as its own gradient is there. grad_dtype: what gradients of weights are summed and reduced in ('float32' as Megatron
    does); None: the weight's own.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.root = Node("")
        self.order = Schedule()
        self.bucket_mb = 25.0
        self.prefetch = 2
        self.optimizer_overlap = False
        self.grad_dtype: str | None = None
        for path in model.ops:
            node = self.root
            for i, word in enumerate(words := path.split(".")):
                node = node.children.setdefault(word, Node(".".join(words[: i + 1])))
            node.is_op = True

    def at(self, glob: str) -> Selection:
        """The nodes a glob names; "" is the root. Error: InvalidParameter where it names none."""
        nodes = [node for node in self.root.walk() if _matches(glob.split(".") if glob else [], node.path.split(".") if node.path else [])]
        if not nodes:
            near = difflib.get_close_matches(glob, [node.path for node in self.root.walk()], n=1, cutoff=0.0)
            raise InvalidParameter(f"strategy path {glob!r} names nothing in model {self.model.name!r}; the nearest is {near[0]!r}")
        return Selection(nodes)

    def schedule(self, num_micro_batches: int = 1, order: str = "1f1b", max_ongoing: Sequence[int] | None = None) -> None:
        """How micro-batches pass the pipeline. 'interleaved' needs meshes that repeat, each rank holding several stages."""
        if num_micro_batches < 1:
            raise InvalidParameter(f"num_micro_batches must be at least 1, got {num_micro_batches}")
        if order not in ORDERS:
            raise InvalidParameter(f"unknown schedule {order!r}; known: {', '.join(ORDERS)}")
        if max_ongoing is not None and min(max_ongoing, default=0) < 1:
            raise InvalidParameter(f"max_ongoing must be at least 1 on every rank, got {list(max_ongoing)}")
        self.order = Schedule(num_micro_batches, order, None if max_ongoing is None else tuple(max_ongoing))

    def ancestry(self, path: str) -> list[Node]:
        """Root to leaf."""
        nodes = [self.root]
        for word in path.split("."):
            nodes.append(nodes[-1].children[word])
        return nodes


class Selection:
    """Nodes of a tree, to be configured together; every method returns the selection."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def map(self, mesh: DeviceMesh) -> Selection:
        for node in self.nodes:
            node.config.mesh = mesh
        return self

    def split(self, **dims: str | Sequence[str] | None) -> Selection:
        """dim=axis or dim=(outer, inner); dim=None says that the dim stays whole, which also stops propagation into it."""
        for node in self.nodes:
            node.config.partition.update({name: _axes(axes) for name, axes in dims.items()})
        return self

    def store(self, item: str, mesh: DeviceMesh | None = None, **dims: str | Sequence[str] | None) -> Selection:
        """Keep an item on `mesh` (else on the computation's), cut as said (every other dim whole)."""
        return self._remember(item, Storage(mesh, {name: _axes(axes) for name, axes in dims.items()}))

    def shard(self, item: str, axis: str | Sequence[str], mesh: DeviceMesh | None = None) -> Selection:
        """Cut an item once more, over `axis`: ZeRO-1 shards 'optimizer', ZeRO-2 'grad' too, ZeRO-3 'weight' too."""
        return self._remember(item, Storage(mesh, None, _axes(axis)))

    def recompute(self) -> Selection:
        """Drop what is inside each node after its forward, and compute it again before its backward."""
        for node in self.nodes:
            node.config.recompute = True
        return self

    def _remember(self, item: str, storage: Storage) -> Selection:
        if item not in ITEMS:
            raise InvalidParameter(f"no memory config for {item!r}; known: {', '.join(ITEMS)}")
        for node in self.nodes:
            node.config.memory[item] = storage
        return self


def _axes(axes: str | Sequence[str] | None) -> Axes:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _matches(glob: list[str], path: list[str]) -> bool:
    if not glob:
        return not path
    if glob[0] == "**":
        return _matches(glob[1:], path) or (bool(path) and _matches(glob, path[1:]))
    return bool(path) and fnmatch.fnmatchcase(path[0], glob[0]) and _matches(glob[1:], path[1:])
