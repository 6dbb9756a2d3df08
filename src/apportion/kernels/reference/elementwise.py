"""Norms, gating, rotation and routing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.kernels.ops import RouteSpec


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """Rotate x [T, heads, rotary_dim] in place by rows `positions` [T] of cos_sin [P, rotary_dim]."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[positions.long(), None].split(half, dim=-1)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    rotated = a * cos - b * sin, b * cos + a * sin
    a.copy_(rotated[0])
    b.copy_(rotated[1])


def route(logits: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1) if spec.scoring == "softmax" else logits.sigmoid()
    eligible = scores
    if spec.num_groups > 1:
        groups = scores.unflatten(-1, (spec.num_groups, -1))
        best = groups.amax(dim=-1).sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_groups]
        kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        eligible = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = eligible.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_k]
    weights = scores.gather(-1, ids)
    if spec.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.int(), weights * spec.scale
