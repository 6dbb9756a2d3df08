"""RMSNorm, alone or with the residual addition before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apportion.kernels.ops import Rounding
from apportion.layers.linear import Linear
from apportion.layers.site import Site
from apportion.layers.weights import TensorSource


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis; the weight is float32 [width]. eps None: the model's."""

    def __init__(self, site: Site, width: int, slot: str = "normed", eps: float | None = None) -> None:
        super().__init__()
        self.name = site.name
        self.width = width
        self.eps = site.spec.norm_eps if eps is None else eps
        self.weight = torch.empty(0)  # a view of the weight arena once bound
        self._slot = slot
        self._activations = site.activations
        self._rounding: Callable[[], Rounding | None] | None = None
        self._rms_norm = site.ops.rms_norm
        self._add_rms_norm = site.ops.add_rms_norm

    def feed(self, linear: Linear | None) -> None:
        """Nothing but `linear` takes the norm: it may be rounded for it at once."""
        self._rounding = None if linear is None else linear.asks()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x [T, width] -> its norm, as RoundedRows where the linear it feeds wants them. With a residual: residual += x in place, and the
        norm of that."""
        rounding = None if self._rounding is None else self._rounding()
        if rounding is not None:
            return rounding.rms_norm(x, residual, self.weight, self.eps)
        out = self._activations.take(self._slot, x.shape[0], self.width)
        if residual is None:
            return self._rms_norm(x, self.weight, self.eps, out)
        return self._add_rms_norm(x, residual, self.weight, self.eps, out)

    @property
    def nbytes(self) -> int:
        return 4 * self.width

    def bind(self, buffer: Tensor) -> None:
        self.weight = buffer.view(torch.float32)

    def sources(self, present: Collection[str]) -> Iterator[TensorSource]:
        yield TensorSource(f"{self.name}.weight", (self.width,), (slice(None),), self._load, init="ones")

    def _load(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    def describe(self) -> dict[str, Any]:
        return {"width": self.width, "dtype": "float32"}
