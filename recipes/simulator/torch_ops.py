"""Every operator kind of the validated models in torch, forward and backward, on a part of its iteration space.

The same contract as simulator/numpy_ops, whose results it is held to; what is timed and what is run for real are these very functions.
"""

from __future__ import annotations

import string

import torch
import torch.nn.functional as F

BETAS, EPS, RATE = (0.9, 0.99), 1e-5, 0.1
aten = torch.ops.aten


def einsum(op, part, xs, shapes):
    letter = dict(zip(op.dims, string.ascii_letters, strict=False))
    spec = ",".join("".join(letter[str(n)] for n in i.dims) for i in op.inputs) + "->" + "".join(letter[str(n)] for n in op.outputs[0].dims)
    return [torch.einsum(spec, *xs)]


def add(op, part, xs, shapes):
    out = op.outputs[0].dims
    a, b = (x.reshape([x.shape[i.dims.index(n)] if n in i.dims else 1 for n in out]) for x, i in zip(xs, op.inputs, strict=True))
    return [a + b]


def layer_norm(op, part, xs, shapes):
    return [F.layer_norm(xs[0], xs[0].shape[-1:], xs[1], xs[2], EPS)]


def layer_norm_grad(op, part, xs, shapes):
    x, w, dy = xs
    _, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], w, None, EPS)
    dx, dw, db = aten.native_layer_norm_backward(dy, x, x.shape[-1:], mean, rstd, w, w, [True] * 3)
    return [dx, dw, db]


def attention(op, part, xs, shapes):
    return [_attend(xs[0]).permute(0, 3, 1, 2, 4)]


def _attend(qkv):
    """[b, g, r, s, d] of qkv [b, s, g, r + 2, d]."""
    x = qkv.permute(0, 2, 3, 1, 4)
    q, k, v = x[:, :, :-2], x[:, :, -2:-1], x[:, :, -1:]
    b, g, r, s, d = q.shape
    k, v = (t.expand(b, g, r, s, d).reshape(b, g * r, s, d) for t in (k, v))
    return F.scaled_dot_product_attention(q.reshape(b, g * r, s, d), k, v, is_causal=True).reshape(b, g, r, s, d)


def attention_grad(op, part, xs, shapes):
    with torch.enable_grad():
        qkv = xs[0].detach().requires_grad_(True)
        return list(torch.autograd.grad(_attend(qkv).permute(0, 3, 1, 2, 4), qkv, xs[1]))


def cross_entropy(op, part, xs, shapes):
    logits, labels = xs[0].reshape(-1, xs[0].shape[-1]), xs[1].reshape(-1).long()
    return [F.cross_entropy(logits, labels, reduction="sum") * op.attrs["scale"]]


def cross_entropy_grad(op, part, xs, shapes):
    p = torch.softmax(xs[0], -1)
    p.scatter_add_(-1, xs[1].long().unsqueeze(-1), torch.full((*xs[1].shape, 1), -1.0, dtype=p.dtype))
    return [p.mul_(op.attrs["scale"])]


def _rows(part, ids):
    low, high = part["v"]
    inside = (ids >= low) & (ids < high)
    return torch.where(inside, ids - low, 0).long(), inside


def embedding(op, part, xs, shapes):
    rows, inside = _rows(part, xs[0])
    return [F.embedding(rows, xs[1]) * inside.unsqueeze(-1)]


def embedding_grad(op, part, xs, shapes):
    rows, inside = _rows(part, xs[0])
    table = torch.zeros(shapes[0], dtype=xs[1].dtype)
    return [table.index_add_(0, rows.reshape(-1), (xs[1] * inside.unsqueeze(-1)).reshape(-1, shapes[0][1]))]


def conv2d(op, part, xs, shapes):
    return [F.conv2d(xs[0], xs[1], stride=op.attrs["stride"], padding=op.attrs["padding"])]


def conv2d_grad_x(op, part, xs, shapes):
    return [torch.nn.grad.conv2d_input(shapes[0], xs[0], xs[1], stride=op.attrs["stride"], padding=op.attrs["padding"])]


def conv2d_grad_w(op, part, xs, shapes):
    return [torch.nn.grad.conv2d_weight(xs[0], shapes[0], xs[1], stride=op.attrs["stride"], padding=op.attrs["padding"])]


def max_pool(op, part, xs, shapes):
    return [F.max_pool2d(xs[0], op.attrs["kernel"], op.attrs["stride"], op.attrs["padding"])]


def max_pool_grad(op, part, xs, shapes):
    kernel, stride, padding = ([op.attrs[n]] * 2 for n in ("kernel", "stride", "padding"))
    _, where = aten.max_pool2d_with_indices(xs[0], kernel, stride, padding)
    return [aten.max_pool2d_with_indices_backward(xs[1], xs[0], kernel, stride, padding, [1, 1], False, where)]


def scale_shift(op, part, xs, shapes):
    return [torch.addcmul(xs[2][:, None, None], xs[0], xs[1][:, None, None])]


def scale_shift_grad(op, part, xs, shapes):
    x, scale, dy = xs
    made = (lambda: dy * scale[:, None, None], lambda: (dy * x).sum((0, 2, 3)), lambda: dy.sum((0, 2, 3)))
    return [made[i]() for i in op.attrs["wrt"]]


def adam(op, part, xs, shapes):
    w, g, mean, square, *_ = xs
    mean = torch.lerp(mean, g, 1 - BETAS[0])
    square = (square * BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    return [torch.addcdiv(w, mean, square.sqrt().add_(EPS), value=-RATE), mean, square]


KERNELS = {
    "einsum": einsum, "add": add, "layer_norm": layer_norm, "layer_norm.grad": layer_norm_grad, "attention": attention,
    "attention.grad": attention_grad, "cross_entropy": cross_entropy, "cross_entropy.grad": cross_entropy_grad,
    "embedding": embedding, "embedding.grad": embedding_grad, "conv2d": conv2d, "conv2d.grad0": conv2d_grad_x,
    "conv2d.grad1": conv2d_grad_w, "max_pool": max_pool, "max_pool.grad": max_pool_grad, "scale_shift": scale_shift,
    "scale_shift.grad": scale_shift_grad, "adam": adam,
    "relu": lambda op, part, xs, shapes: [torch.relu(xs[0])],
    "relu.grad": lambda op, part, xs, shapes: [aten.threshold_backward(xs[1], xs[0], 0)],
    "gelu": lambda op, part, xs, shapes: [F.gelu(xs[0], approximate="tanh")],
    "gelu.grad": lambda op, part, xs, shapes: [aten.gelu_backward(xs[1], xs[0], approximate="tanh")],
}  # fmt: skip
