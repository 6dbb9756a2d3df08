"""GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1), columns in order of falling curvature within groups whose scales are set before.

A column is rounded, and what that loses is taken over by the columns still to come, as the inverse Hessian of their inputs says.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import dequantize, encode, quantize, spread

BLOCK = 128  # columns between two updates of all that follow


def gptq(weight: Tensor, fmt: NumberFormat, hessian: Tensor | None, damping: float = 0.01) -> QuantizedWeight:
    """weight float32 [N, C], hessian [C, C]: mean of x x^T. Scales are those of round to nearest ("static groups"), so that sorting the
    columns moves none of them to another group. damping: of the mean curvature. A channel that was always 0 is rounded to nearest, never
    zeroed."""
    rounded = quantize(weight, fmt)
    if hessian is None:
        return rounded
    shape = (weight.shape[0], weight.shape[1])
    scale = spread(rounded.scale, shape, fmt.block)
    zero = None if rounded.zero is None else spread(rounded.zero, shape, fmt.block)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damping)
    w = weight[:, order].double()
    column = replace(fmt, scale="channel", block=(1, 0))
    codes = torch.empty(shape, dtype=torch.uint8)
    for first in range(0, shape[1], BLOCK):
        last = min(first + BLOCK, shape[1])
        lost = torch.zeros(shape[0], last - first, dtype=torch.float64)
        for i in range(first, last):
            at = slice(int(order[i]), int(order[i]) + 1)
            own_zero = None if zero is None else zero[:, at].contiguous()
            code = encode(w[:, i : i + 1].float(), scale[:, at], own_zero, column)
            near = dequantize(QuantizedWeight(column, code, scale[:, at].contiguous(), own_zero))
            codes[:, at] = code
            error = (w[:, i] - near[:, 0].double()) / factor[i, i]
            w[:, i:last] -= error[:, None] * factor[i, i:last]
            lost[:, i - first] = error
        w[:, last:] -= lost @ factor[first:last, last:]
    return QuantizedWeight(fmt, codes, rounded.scale, rounded.zero)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian [C, C]."""
    h = hessian.double().clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean  # a silent channel has a curvature of its own and is coupled to none
    damping = max(damping, 1e-6) * mean
    while True:  # nearly singular where there were few tokens: more damping until it can be inverted
        lower, failed = torch.linalg.cholesky_ex(h + damping * torch.eye(len(h), dtype=h.dtype))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
