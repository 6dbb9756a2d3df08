"""What calibration remembers of the inputs of a projection."""

from __future__ import annotations

import torch
from torch import Tensor


class InputStatistics:
    """Sums over tokens of an input x [T, C]. A token's weight enters the Hessian and the means alike; padding never gets here.

    hessian: sum of w x x^T, float64 [C, C], None where no method asks for it. mean_abs: sum of w |x|. largest: of each channel.
    """

    def __init__(self, width: int, hessian: bool) -> None:
        self.num_tokens = 0
        self.weight = 0.0
        self.hessian = torch.zeros(width, width, dtype=torch.float64) if hessian else None
        self.mean_abs = torch.zeros(width, dtype=torch.float64)
        self.largest = torch.zeros(width)

    def add(self, x: Tensor, weights: Tensor) -> None:
        """x float32 [T, C], weights [T]."""
        if not len(x):
            return
        self.num_tokens += len(x)
        self.weight += float(weights.sum())
        if self.hessian is not None:
            scaled = x * weights.sqrt()[:, None]
            self.hessian += (scaled.T @ scaled).double()
        self.mean_abs += (x.abs() * weights[:, None]).sum(0).double()
        self.largest = torch.maximum(self.largest, x.abs().amax(0))

    def divide(self, scale: Tensor) -> None:
        """As if every input had been divided by `scale` [C]."""
        self.largest /= scale
        self.mean_abs /= scale.double()
        if self.hessian is not None:
            self.hessian /= scale.double().outer(scale.double())

    def mean_hessian(self, pooled: InputStatistics | None = None) -> Tensor:
        """H / sum of weights [C, C]. With `pooled` (all experts' tokens) drawn towards its mean the more, the fewer tokens there were:
        as if C tokens of the pool had been seen besides, so that an expert that no token reached has the pool's."""
        assert self.hessian is not None
        if pooled is None or pooled.hessian is None or pooled.weight == 0:
            return self.hessian / max(self.weight, 1e-12)
        besides = float(len(self.mean_abs))
        return (self.hessian + besides * pooled.hessian / pooled.weight) / (self.weight + besides)
