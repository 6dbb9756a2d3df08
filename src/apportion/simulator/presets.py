"""Strategies that have names, as annotations of a tree: what a user would write by hand, and may change afterwards.

The paths and dims are those of `models.transformer`, except for `data_parallel` and `zero`, which fit every model.
"""

from __future__ import annotations

from apportion.core.errors import InvalidParameter
from apportion.simulator.cluster import DeviceMesh
from apportion.simulator.strategy_tree import StrategyTree

# What sequence parallelism cuts: all between the two products of a layer that tensor parallelism cuts.
SEQUENCE_PARALLEL = (
    "**.attn_norm", "**.mlp_norm", "**.attn_add", "**.mlp_add", "**.out_bias", "**.down_bias", "final_norm",
    "**.attn_out_mask", "**.attn_out_drop", "**.mlp_out_mask", "**.mlp_out_drop",
)  # fmt: skip


def data_parallel(tree: StrategyTree, mesh: DeviceMesh, axis: str = "dp") -> None:
    """Every operator on every device of the mesh, the batch cut over `axis`."""
    tree.at("").map(mesh).split(b=axis)


def zero(tree: StrategyTree, stage: int, axis: str = "dp") -> None:
    """ZeRO (arXiv:1910.02054): shard the optimizer's states (1), the gradients too (2), the parameters too (3)."""
    if stage not in (1, 2, 3):
        raise InvalidParameter(f"ZeRO has stages 1, 2 and 3, not {stage}")
    for item in ("optimizer", "grad", "weight")[:stage]:
        tree.at("").shard(item, axis)


def tensor_parallel(tree: StrategyTree, axis: str = "tp", *, sequence_parallel: bool = False) -> None:
    """Megatron (arXiv:1909.08053); with sequence_parallel norms and sums are cut over the sequence (arXiv:2205.05198)."""
    words = {node.path for node in tree.root.walk()}
    _where(tree, words, "**.attn.*", g=axis)
    _where(tree, words, "**.attn.core.*", g=axis)
    _where(tree, words, "**.mlp.*", f=axis)
    tree.at("embed").split(v=axis)
    tree.at("head").split(v=axis)
    if sequence_parallel:
        for glob in SEQUENCE_PARALLEL:
            _where(tree, words, glob, s=axis)


def expert_parallel(tree: StrategyTree, axis: str = "dp") -> None:
    """Experts over the data-parallel devices: tokens go there and come back by all-to-all (GShard, arXiv:2006.16668)."""
    tree.at("**.moe.experts").split(b=None, e=axis)
    tree.at("**.moe.experts.*").split(b=None, e=axis)


def pipeline(tree: StrategyTree, mesh: DeviceMesh, num_layers: int, axis: str = "pp", *, chunks: int = 1) -> None:
    """Layers in equal runs over the slices of `axis`, each slice holding `chunks` runs (interleaved); embedding first, head last."""
    num_stages = mesh.sizes.get(axis, 1) * chunks
    if num_layers % num_stages:
        raise InvalidParameter(f"{num_layers} layers cannot be cut into {num_stages} equal pipeline stages")
    ranks = [mesh.select(**{axis: i}) for i in range(mesh.sizes[axis])]
    for i in range(num_layers):
        tree.at(f"layers.{i}").map(ranks[i * num_stages // num_layers % len(ranks)])
    tree.at("embed").map(ranks[0])
    for path in ("final_norm", "head", "loss"):
        tree.at(path).map(ranks[-1])


def _where(tree: StrategyTree, words: set[str], glob: str, **dims: str) -> None:
    """Split the operators of a glob that have the dims; a glob that names nothing here belongs to another family."""
    fixed = {word for word in glob.split(".") if "*" not in word}
    if not any(fixed <= set(path.split(".")) for path in words):
        return
    for node in tree.at(glob).nodes:
        if node.is_op:
            here = {dim: axis for dim, axis in dims.items() if dim in tree.model.ops[node.path].dims}
            node.config.partition.update({dim: (axis,) for dim, axis in here.items()})
