"""Every operator kind in numpy, forward and backward, on a part of its iteration space: the meaning that the interpreter gives to a graph.

A kernel takes (op, part, inputs, shapes): dim -> interval, the operands' parts in order, the shapes of the output parts. Clear, not fast.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from apportion.simulator.ops import Op, Operand

Array = npt.NDArray[Any]
Part = Mapping[str, tuple[int, int]]
Shapes = Sequence[tuple[int, ...]]
Kernel = Callable[[Op, Part, Sequence[Array], Shapes], list[Array]]
EPS, LEARNING_RATE, MOMENTUM, BETAS = 1e-5, 0.1, 0.9, (0.9, 0.99)


def _einsum(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    letter = dict(zip(op.dims, string.ascii_letters, strict=False))

    def subscripts(operand: Operand) -> str:
        return "".join(letter[str(name)] for name in operand.dims)

    spec = ",".join(map(subscripts, op.inputs)) + "->" + subscripts(op.outputs[0])
    return [np.einsum(spec, *xs)]


def _add(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    out = op.outputs[0].dims
    aligned = [x.reshape([x.shape[i.dims.index(n)] if n in i.dims else 1 for n in out]) for x, i in zip(xs, op.inputs, strict=True)]
    return [aligned[0] + aligned[1]]


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def _softmax_grad(p: Array, dp: Array) -> Array:
    return np.asarray(p * (dp - (p * dp).sum(-1, keepdims=True)))


def _gelu_parts(x: Array) -> tuple[Array, Array]:
    """(tanh, its derivative) of the tanh approximation."""
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return t, (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _gelu_grad(x: Array, dy: Array) -> Array:
    t, dt = _gelu_parts(x)
    return np.asarray(dy * (0.5 * (1 + t) + 0.5 * x * dt))


def _silu_mul(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    a, b = np.moveaxis(xs[0], op.inputs[0].dims.index(None), 0)
    return [a / (1 + np.exp(-a)) * b]


def _silu_mul_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    axis = op.inputs[0].dims.index(None)
    a, b = np.moveaxis(xs[0], axis, 0)
    sigmoid = 1 / (1 + np.exp(-a))
    da = xs[1] * b * sigmoid * (1 + a * (1 - sigmoid))
    return [np.stack([da, xs[1] * a * sigmoid], axis)]


def _layer_norm(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    x, w, b = xs
    centred = x - x.mean(-1, keepdims=True)
    return [centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * w + b]


def _layer_norm_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    x, w, dy = xs
    centred = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    y, g = centred * scale, dy * w
    dx = scale * (g - g.mean(-1, keepdims=True) - y * (g * y).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return [dx, (dy * y).sum(rows), dy.sum(rows)]


def _rms_norm(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [xs[0] / np.sqrt((xs[0] ** 2).mean(-1, keepdims=True) + EPS) * xs[1]]


def _rms_norm_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    x, w, dy = xs
    scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    y, g = x * scale, dy * w
    return [scale * (g - y * (g * y).mean(-1, keepdims=True)), (dy * y).sum(tuple(range(x.ndim - 1)))]


def _rows(part: Part, ids: Array) -> tuple[Array, Array]:
    """(row inside the part, whether it is) of each id."""
    low, high = part["v"]
    inside = (ids >= low) & (ids < high)
    return np.where(inside, ids - low, 0), inside


def _embedding(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    rows, inside = _rows(part, xs[0])
    found = xs[1][rows] * inside[..., None]
    return [found.sum(1) if op.kind == "embedding_bag" else found]


def _embedding_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    rows, inside = _rows(part, xs[0])
    dy = xs[1][:, None] if op.kind == "embedding_bag.grad" else xs[1]
    table = np.zeros(shapes[0], xs[1].dtype)
    np.add.at(table, rows, dy * inside[..., None])
    return [table]


def _attend(qkv: Array) -> tuple[Array, Array, Array, Array]:
    """(queries, keys, values, causal probabilities); qkv: [b, s, g, r + 2, d]."""
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    scores = np.einsum("bsgrd,btgd->bgrst", q, k) * qkv.shape[-1] ** -0.5
    mask = np.tril(np.ones(scores.shape[-2:], bool))
    return q, k, v, _softmax(np.where(mask, scores, -1e30))


def _attention(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    _, _, v, p = _attend(xs[0])
    return [np.einsum("bgrst,btgd->bsgrd", p, v)]


def _attention_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    q, k, v, p = _attend(xs[0])
    ds = _softmax_grad(p, np.einsum("bsgrd,btgd->bgrst", xs[1], v)) * q.shape[-1] ** -0.5
    dq = np.einsum("bgrst,btgd->bsgrd", ds, k)
    dk = np.einsum("bgrst,bsgrd->btgd", ds, q)
    dv = np.einsum("bgrst,bsgrd->btgd", p, xs[1])
    return [np.concatenate([dq, dk[..., None, :], dv[..., None, :]], -2)]


def _scores(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    q, k = xs[0][..., :-2, :], xs[0][..., -2, :]
    scores = np.einsum("bsgrd,btgd->bgrst", q, k) * q.shape[-1] ** -0.5
    return [np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -1e30)]


def _scores_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    q, k = xs[0][..., :-2, :], xs[0][..., -2, :]
    ds = xs[1] * np.tril(np.ones(xs[1].shape[-2:], bool)) * q.shape[-1] ** -0.5
    dq, dk = np.einsum("bgrst,btgd->bsgrd", ds, k), np.einsum("bgrst,bsgrd->btgd", ds, q)
    return [np.concatenate([dq, dk[..., None, :], np.zeros_like(dk)[..., None, :]], -2)]


def _attend_values(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [np.einsum("bgrst,btgd->bsgrd", xs[0], xs[1][..., -1, :])]


def _attend_values_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    p, qkv, dy = xs
    dqkv = np.zeros_like(qkv)
    dqkv[..., -1, :] = np.einsum("bgrst,bsgrd->btgd", p, dy)
    return [np.einsum("bsgrd,btgd->bgrst", dy, qkv[..., -1, :]), dqkv]


def _cross_entropy(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    p = np.take_along_axis(_softmax(xs[0]), xs[1][..., None], -1)
    return [np.asarray(-np.log(p).sum() * op.attrs["scale"])]


def _cross_entropy_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    one_hot = np.arange(xs[0].shape[-1]) == xs[1][..., None]
    return [(_softmax(xs[0]) - one_hot) * op.attrs["scale"]]


def _bce(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [np.asarray((np.logaddexp(0, xs[0]) - xs[0] * xs[1]).sum() * op.attrs["scale"])]


def _bce_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [(1 / (1 + np.exp(-xs[0])) - xs[1]) * op.attrs["scale"]]


def _windows(op: Op, x: Array, kernel: tuple[int, int], fill: float = 0.0) -> Array:
    """[b, c, y, x, ky, kx]"""
    pad, stride = op.attrs["padding"], op.attrs["stride"]
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(x, kernel, (2, 3))[:, :, ::stride, ::stride])


def _unwindow(op: Op, d: Array, shape: tuple[int, ...]) -> Array:
    """The adjoint of `_windows`: sum [b, c, y, x, ky, kx] back into an image."""
    pad, stride = op.attrs["padding"], op.attrs["stride"]
    image = np.zeros((*shape[:2], shape[2] + 2 * pad, shape[3] + 2 * pad), d.dtype)
    for i in range(d.shape[4]):
        for j in range(d.shape[5]):
            image[:, :, i : i + stride * d.shape[2] : stride, j : j + stride * d.shape[3] : stride] += d[..., i, j]
    return image[:, :, pad : pad + shape[2], pad : pad + shape[3]]


def _conv2d(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [np.einsum("bcyxij,ocij->boyx", _windows(op, xs[0], xs[1].shape[2:]), xs[1], optimize=True)]


def _conv2d_grad_x(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [_unwindow(op, np.einsum("boyx,ocij->bcyxij", xs[1], xs[0], optimize=True), shapes[0])]


def _conv2d_grad_w(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [np.einsum("boyx,bcyxij->ocij", xs[1], _windows(op, xs[0], (shapes[0][2], shapes[0][3])), optimize=True)]


def _max_pool(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [_windows(op, xs[0], (op.attrs["kernel"],) * 2, -1e30).max((4, 5))]


def _max_pool_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    windows = _windows(op, xs[0], (op.attrs["kernel"],) * 2, -1e30)
    flat = windows.reshape(*windows.shape[:4], -1)
    first = flat.argmax(-1)[..., None] == np.arange(flat.shape[-1])
    return [_unwindow(op, (first * xs[1][..., None]).reshape(windows.shape), shapes[0])]


def _avg_pool(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [_windows(op, xs[0], (op.attrs["kernel"],) * 2).mean((4, 5))]


def _avg_pool_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    kernel = op.attrs["kernel"]
    spread = np.broadcast_to((xs[0] / kernel**2)[..., None, None], (*xs[0].shape, kernel, kernel))
    return [_unwindow(op, spread, shapes[0])]


def _scale_shift(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [xs[0] * xs[1][:, None, None] + xs[2][:, None, None]]


def _scale_shift_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    x, scale, dy = xs
    made = [dy * scale[:, None, None], (dy * x).sum((0, 2, 3)), dy.sum((0, 2, 3))]
    return [made[i] for i in op.attrs["wrt"]]


def _stack_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return [xs[0][:, i] for i in op.attrs["wrt"]]


def _concat_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    return np.split(xs[0], np.cumsum([shape[1] for shape in shapes])[:-1], 1)


def _places(op: Op, logits: Array, capacity: int) -> tuple[Array, Array]:
    """(probabilities [b, s, e], place of each token in each expert [b, s, e, c] as ones); tokens take places in order, late ones none."""
    p = _softmax(logits)
    chosen = np.zeros(p.shape, bool)
    np.put_along_axis(chosen, np.argsort(-p, -1, kind="stable")[..., : op.attrs["top_k"]], True, -1)
    order = np.cumsum(chosen, 1) - 1
    return p, (chosen[..., None] & (order[..., None] == np.arange(capacity))).astype(p.dtype)


def _route(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    p, places = _places(op, xs[0], shapes[0][-1])
    return [p[..., None] * places]


def _route_grad(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    p, places = _places(op, xs[0], xs[1].shape[-1])
    return [_softmax_grad(p, (xs[1] * places).sum(-1))]


def _sgd(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    w, g, momentum, *master = xs
    momentum = MOMENTUM * momentum + g
    w = (master[0] if master else w) - LEARNING_RATE * momentum
    return [w, momentum, *([w] if master else [])]


def _adam(op: Op, part: Part, xs: Sequence[Array], shapes: Shapes) -> list[Array]:
    w, g, mean, square, *master = xs
    mean = BETAS[0] * mean + (1 - BETAS[0]) * g
    square = BETAS[1] * square + (1 - BETAS[1]) * g * g
    w = (master[0] if master else w) - LEARNING_RATE * mean / (np.sqrt(square) + EPS)
    return [w, mean, square, *([w] if master else [])]


KERNELS: dict[str, Kernel] = {
    "einsum": _einsum,
    "add": _add,
    "relu": lambda op, part, xs, shapes: [np.maximum(xs[0], 0)],
    "relu.grad": lambda op, part, xs, shapes: [xs[1] * (xs[0] > 0)],
    "nonzero": lambda op, part, xs, shapes: [(xs[0] != 0).astype(xs[0].dtype)],
    "gelu": lambda op, part, xs, shapes: [0.5 * xs[0] * (1 + _gelu_parts(xs[0])[0])],
    "gelu.grad": lambda op, part, xs, shapes: [_gelu_grad(xs[0], xs[1])],
    "silu_mul": _silu_mul,
    "silu_mul.grad": _silu_mul_grad,
    "layer_norm": _layer_norm,
    "layer_norm.grad": _layer_norm_grad,
    "rms_norm": _rms_norm,
    "rms_norm.grad": _rms_norm_grad,
    "embedding": _embedding,
    "embedding.grad": _embedding_grad,
    "embedding_bag": _embedding,
    "embedding_bag.grad": _embedding_grad,
    "attention": _attention,
    "attention.grad": _attention_grad,
    "scores": _scores,
    "scores.grad": _scores_grad,
    "softmax": lambda op, part, xs, shapes: [_softmax(xs[0])],
    "softmax.grad": lambda op, part, xs, shapes: [_softmax_grad(xs[0], xs[1])],
    "attend": _attend_values,
    "attend.grad": _attend_values_grad,
    "cross_entropy": _cross_entropy,
    "cross_entropy.grad": _cross_entropy_grad,
    "bce": _bce,
    "bce.grad": _bce_grad,
    "conv2d": _conv2d,
    "conv2d.grad0": _conv2d_grad_x,
    "conv2d.grad1": _conv2d_grad_w,
    "max_pool": _max_pool,
    "max_pool.grad": _max_pool_grad,
    "avg_pool": _avg_pool,
    "avg_pool.grad": _avg_pool_grad,
    "scale_shift": _scale_shift,
    "scale_shift.grad": _scale_shift_grad,
    "stack": lambda op, part, xs, shapes: [np.stack(xs, 1)],
    "stack.grad": _stack_grad,
    "concat": lambda op, part, xs, shapes: [np.concatenate(xs, 1)],
    "concat.grad": _concat_grad,
    "route": _route,
    "route.grad": _route_grad,
    "sgd": _sgd,
    "adam": _adam,
}
