"""The optimizer of the matrices: Muon (Jordan et al. 2024, scaled as in Liu et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised (five Newton-Schulz steps in bf16), scaled to the root mean square of an AdamW step.

    Takes parameters of two dimensions, or of three for stacks of matrices. Those of one shape are updated together.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                self.state[p].setdefault("momentum", torch.zeros_like(p))
                by_shape.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]).view(-1, rows, columns).bfloat16())
                stacked = orthogonalise(torch.cat(updates)) * (0.2 * math.sqrt(max(rows, columns)))
                for p, update in zip(params, stacked.split([len(u) for u in updates]), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.float().view_as(p), alpha=group["lr"])


def orthogonalise(x_NRC: Tensor) -> Tensor:
    """U V^T of each matrix, roughly: the quintic iteration of Muon."""
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = x_NRC.mT if tall else x_NRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
