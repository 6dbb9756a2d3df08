"""Round to nearest: each block's scale from its extremes. Needs no data."""

from __future__ import annotations

from torch import Tensor

from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import quantize


def round_to_nearest(weight: Tensor, fmt: NumberFormat, hessian: Tensor | None = None) -> QuantizedWeight:
    """weight [N, C] -> its codes and scales."""
    return quantize(weight, fmt)
