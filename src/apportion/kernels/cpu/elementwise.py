"""Norms, gating and routing on the CPU (csrc/cpu/elementwise.h). Knows strides and addresses; must not know layers or models."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.kernels.cpu.extension import load
from apportion.kernels.ops import RouteSpec


class Elementwise:
    """The row-wise operators of `kernels.ops.Ops` for one thread team."""

    def __init__(self, team: object) -> None:
        kernel = load().Elementwise(team)
        self._rms_norm, self._add_rms_norm = kernel.rms_norm, kernel.add_rms_norm
        self._silu_mul, self._route = kernel.silu_mul, kernel.route

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        rows, width = x.shape
        if out is None:
            out = torch.empty((rows, width))
        self._rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), eps, out.data_ptr(), out.stride(0), rows, width)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        rows, width = x.shape
        if out is None:
            out = torch.empty((rows, width))
        self._add_rms_norm(
            x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0), weight.data_ptr(), eps, out.data_ptr(), rows, width
        )
        return out

    def silu_mul(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        rows, width = x.shape
        if out is None:
            out = torch.empty((rows, width // 2))
        self._silu_mul(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), rows, width // 2)
        return out

    def route(self, logits: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
        rows = logits.shape[0]
        ids = torch.empty((rows, spec.top_k), dtype=torch.int32)
        weights = torch.empty((rows, spec.top_k))
        self._route(_route(spec), logits.data_ptr(), logits.stride(0), ids.data_ptr(), weights.data_ptr(), rows)
        return ids, weights


@cache
def _route(spec: RouteSpec) -> Any:
    if spec.scoring not in ("softmax", "sigmoid"):
        raise Unsupported(f"routers score by 'softmax' or 'sigmoid', not '{spec.scoring}'.")
    if not 1 <= spec.top_k <= spec.num_experts:
        raise InvalidParameter(f"top_k is {spec.top_k} of {spec.num_experts} experts.")
    if spec.num_experts % spec.num_groups or not 1 <= spec.top_groups <= spec.num_groups:
        raise InvalidParameter(f"{spec.num_experts} experts do not form {spec.num_groups} groups of which {spec.top_groups} are chosen.")
    return load().Route(
        spec.num_experts, spec.top_k, spec.scoring == "sigmoid", spec.renormalize, spec.num_groups, spec.top_groups, spec.scale
    )
