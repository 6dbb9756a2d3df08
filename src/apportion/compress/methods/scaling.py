"""Scales moved from the inputs of linears into what comes before them, which changes no result before rounding: AWQ and SmoothQuant.

AWQ: Lin et al., arXiv:2306.00978, sections 3.2 and 3.3 (clipping). SmoothQuant: Xiao et al., arXiv:2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apportion.compress.statistics import InputStatistics
from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import dequantize, encode, quantize, scale_for

GRID = 20  # exponents tried, from 0 (nothing is moved) up
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def weighted_error(weight: Tensor, near: Tensor, hessian: Tensor) -> float:
    """Mean over tokens of |(W - near) x|^2, from the mean Hessian of x."""
    lost = (weight - near).double()
    return float(((lost @ hessian) * lost).sum())


def awq_scale(weights: Sequence[Tensor], formats: Sequence[NumberFormat], seen: InputStatistics) -> Tensor:
    """One scale for each input [C] that all `weights` [N, C] share: mean|x|^a, the a of a grid under which their rounding costs least."""
    hessian = seen.mean_hessian()
    mean = (seen.mean_abs / max(seen.weight, 1e-12)).float().clamp(min=1e-6)
    best, least = torch.ones_like(mean), float("inf")
    for step in range(GRID):
        scale = mean ** (step / GRID)
        scale /= (scale.max() * scale.min()).sqrt()
        cost = sum(
            weighted_error(w, dequantize(quantize(w * scale, fmt)) / scale, hessian) for w, fmt in zip(weights, formats, strict=True)
        )
        if cost < least:
            best, least = scale, cost
    return best


def smooth_scale(weights: Sequence[Tensor], seen: InputStatistics, strength: float) -> Tensor:
    """max|x|^a / max|w|^(1 - a) for each input [C], a = `strength`: outliers of the input become the weights' to carry."""
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=1e-5)
    scale = seen.largest.clamp(min=1e-5) ** strength / largest ** (1 - strength)
    return scale.clamp(min=1e-5)


def clipped(weight: Tensor, fmt: NumberFormat, hessian: Tensor | None) -> QuantizedWeight:
    """Round to nearest, the range of every group of an output narrowed where that costs less of what the group adds to the output."""
    whole = quantize(weight, fmt)
    if hessian is None or fmt.scale not in ("group", "channel") or not fmt.is_integer:
        return whole
    n, c = weight.shape
    width = fmt.block[1] or c
    rest = -c % width
    square = torch.nn.functional.pad(hessian.float(), (0, rest, 0, rest)).view((c + rest) // width, width, -1, width)
    own = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # each group's inputs among themselves [G, width, width]

    def groups(matrix: Tensor) -> Tensor:
        """[N, C] -> [G, N, width]"""
        return torch.nn.functional.pad(matrix, (0, rest)).view(n, -1, width).transpose(0, 1)

    low, high = (edge.T.contiguous() for edge in (groups(weight).amin(2).clamp(max=0), groups(weight).amax(2).clamp(min=0)))
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for clip in CLIPS:
        scale, zero = scale_for(low * clip, high * clip, fmt)
        lost = groups(weight - dequantize(QuantizedWeight(fmt, encode(weight, scale, zero, fmt), scale, zero)))
        cost = ((lost @ own) * lost).sum(2).T
        better = cost < least
        best, least = torch.where(better, clip, best), torch.where(better, cost, least)
    scale, zero = scale_for(low * best, high * best, fmt)
    return QuantizedWeight(fmt, encode(weight, scale, zero, fmt), scale, zero)
