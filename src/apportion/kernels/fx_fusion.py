"""Our fused operators in models of plain torch: a backend for torch.compile that finds what they compute in the graph and puts them there.

Found, in float32: RMSNorm as it is written out (with the residual addition before it), SiLU of one half times the other, rotation of half
heads. Everything else of the graph runs as torch runs it. Knows operators, must not know models; the engine's own layers call
kernels/ops directly and need none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from apportion.kernels.ops import Ops

aten = torch.ops.aten
Match = Callable[[fx.Node, Ops], Callable[[], fx.Node] | None]


def fusing(ops: Ops) -> Callable[..., Any]:
    """For `torch.compile(model, backend=fusing(ops))`, under torch.no_grad()."""

    def compile_forward(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        fuse(graph, ops)
        return make_boxed_func(graph.forward)

    backend: Callable[..., Any] = aot_autograd(fw_compiler=compile_forward)
    return backend


def fuse(module: fx.GraphModule, ops: Ops) -> int:
    """Replace what `ops` can compute in a graph of aten operators; returns how many places were found."""
    found = 0
    for match in (_norm, _silu_mul, _rotation):
        for node in list(module.graph.nodes):
            if node.op != "call_function" or not node.users or getattr(node.meta.get("val"), "dtype", None) != torch.float32:
                continue
            replace = match(node, ops)
            if replace is not None:
                with module.graph.inserting_before(node):
                    fused = replace()
                fused.meta = node.meta
                node.replace_all_uses_with(fused)
                module.graph.eliminate_dead_code()
                found += 1
    module.recompile()
    return found


# -- what replaces ----------------------------------------------------------------------------------------------------------------


def add_rms_norm(ops: Ops, overwrite: bool, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum), the sum in the residual's memory where nobody reads that any more."""
    in_place = overwrite and residual.is_contiguous()  # or flattening would copy it
    total = residual if in_place else residual.clone(memory_format=torch.contiguous_format)
    normed = ops.add_rms_norm(x.flatten(0, -2), total.flatten(0, -2), weight, eps)
    return normed.view(x.shape), total


def rms_norm(ops: Ops, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x.flatten(0, -2), weight, eps).view(x.shape)


def silu_mul(ops: Ops, x: Tensor) -> Tensor:
    return ops.silu_mul(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def rotate(ops: Ops, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D]; cos and sin [T, 1, D], each half alike."""
    half, rotated = x.shape[-1] // 2, x.clone()
    table = torch.cat((cos[:, 0, :half], sin[:, 0, :half]), dim=-1)
    ops.rotate(rotated, torch.arange(len(x), dtype=torch.int32, device=x.device), table, False)
    return rotated


# -- what is found ----------------------------------------------------------------------------------------------------------------


def _norm(node: fx.Node, ops: Ops) -> Callable[[], fx.Node] | None:
    """x * rsqrt(mean(x * x) + eps) * weight, with x = a + b where that is a sum."""
    for weight, normed in _orders(node, aten.mul.Tensor):
        if not (_is(weight) and weight.meta["val"].dim() == 1):
            continue
        for x, scale in _orders(normed, aten.mul.Tensor):
            mean = (
                scale.args[0].args[0] if _is(scale, aten.rsqrt.default) and _is(scale.args[0], aten.add.Tensor, aten.add.Scalar) else None
            )
            if not (_is(mean, aten.mean.dim) and list(mean.args[1]) == [-1] and mean.args[2] is True and _squares(mean.args[0], x)):
                continue
            eps, graph = scale.args[0].args[1], node.graph
            if not isinstance(eps, float) or x.meta["val"].dim() < 2:
                continue
            if not (_is(x, aten.add.Tensor) and len({tuple(a.meta["val"].shape) for a in x.args if _is(a)}) == 1 == len(x.args) - 1):
                return lambda: _call(graph, rms_norm, ops, x, weight, eps)
            return partial(_place_add_norm, ops, x, weight, eps)
    return None


def _place_add_norm(ops: Ops, total: fx.Node, weight: fx.Node, eps: float) -> fx.Node:
    """In the place of the sum, whose other readers take it from there."""
    x, residual = total.args
    if _last_read(x, total) and not _last_read(residual, total):
        x, residual = residual, x
    graph = total.graph
    with graph.inserting_before(total):
        both = _call(graph, add_rms_norm, ops, _last_read(residual, total), x, residual, weight, eps)
        normed, summed = (graph.call_function(getitem, (both, i)) for i in range(2))
    summed.meta = total.meta
    total.replace_all_uses_with(summed)
    return normed


def _call(graph: fx.Graph, function: Callable[..., Any], ops: Ops, *arguments: Any) -> fx.Node:
    return graph.call_function(update_wrapper(partial(function, ops), function), arguments)


def _last_read(node: Any, reader: fx.Node) -> bool:
    """Whether `node` owns its memory, whole, and `reader` is the last to read it."""
    if not _is(node) or node.op != "call_function" or any(_may_alias(user) for user in (node, *node.users)):
        return False
    return all(user is reader or user < reader for user in node.users)


def _may_alias(node: fx.Node) -> bool:
    return node.op == "output" or getattr(node.target, "is_view", False)


def _silu_mul(node: fx.Node, ops: Ops) -> Callable[[], fx.Node] | None:
    """silu(first half) * second half of one tensor."""
    for gated, up in _orders(node, aten.mul.Tensor):
        gate = gated.args[0] if _is(gated, aten.silu.default) else None
        whole = _halves(gate, up)
        if whole is not None:
            return lambda: _call(node.graph, silu_mul, ops, whole)
    return None


def _halves(first: Any, second: Any) -> fx.Node | None:
    """The tensor whose last axis `first` and `second` are the halves of."""
    if not (_is(first) and _is(second) and first.args[1:2] == (0,) and second.args[1:2] == (1,) and first.args[0] is second.args[0]):
        return None
    split = first.args[0]
    if not _is(split, aten.split.Tensor) or len(split.args) != 3:
        return None
    whole, size, axis = split.args
    shape = whole.meta["val"].shape
    return whole if axis in (-1, len(shape) - 1) and len(shape) > 1 and 2 * size == shape[-1] else None


def _rotation(node: fx.Node, ops: Ops) -> Callable[[], fx.Node] | None:
    """x * cos + cat(-x[half:], x[:half]) * sin."""
    for straight, turned in _orders(node, aten.add.Tensor):
        for x, cos in _orders(straight, aten.mul.Tensor):
            for crossed, sin in _orders(turned, aten.mul.Tensor):
                if _is(cos) and _is(sin) and _is(x) and _crosses(crossed, x) and x.meta["val"].dim() == 3:
                    if tuple(cos.meta["val"].shape) == tuple(sin.meta["val"].shape) == (x.meta["val"].shape[0], 1, x.meta["val"].shape[2]):
                        return partial(_call, node.graph, rotate, ops, x, cos, sin)
    return None


def _crosses(node: Any, x: fx.Node) -> bool:
    if not (_is(node, aten.cat.default) and len(node.args[0]) == 2 and node.args[1] in (-1, 2) and _is(node.args[0][0], aten.neg.default)):
        return False
    second, first = node.args[0][0].args[0], node.args[0][1]
    half = x.meta["val"].shape[-1] // 2
    if not (_is(second, aten.slice.Tensor) and _is(first, aten.slice.Tensor) and second.args[0] is x and first.args[0] is x):
        return False
    return second.args[1] in (-1, 2) and second.args[2] == half and second.args[3] >= 2 * half and tuple(first.args[2:4]) == (0, half)


def _squares(node: Any, x: fx.Node) -> bool:
    return (_is(node, aten.pow.Tensor_Scalar) and node.args == (x, 2)) or (_is(node, aten.mul.Tensor) and node.args == (x, x))


def _orders(node: Any, target: Any) -> list[tuple[Any, Any]]:
    """Both orders of the two operands."""
    return [tuple(node.args), tuple(reversed(node.args))] if _is(node, target) and len(node.args) == 2 else []


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and (not targets or node.target in targets)
