"""Linears and experts with plain row-major weights in the bound buffer; every product in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.core.config import DTYPES
from apportion.kernels.ops import ExpertsSpec, LinearSpec
from apportion.kernels.reference.formats import TORCH_DTYPES


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


def _matrix(buffer: Tensor, start: int, rows: int, columns: int, dtype: str) -> Tensor:
    """The bytes from `start` on as a matrix [rows, columns], sharing storage."""
    return buffer[start : start + rows * columns * DTYPES[dtype]].view(TORCH_DTYPES[dtype]).view(rows, columns)


class ReferenceLinear:
    """kernels/ops.Linear. Buffer: the weight [N, C], then (256-byte aligned) the bias float32 [N]."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self._bias_start = _aligned(spec.out_features * spec.in_features * DTYPES[spec.dtype])
        self.nbytes = self._bias_start + (_aligned(spec.out_features * 4) if spec.bias else 0)

    def bind(self, buffer: Tensor) -> None:
        n, c = self.spec.out_features, self.spec.in_features
        self._weight = _matrix(buffer, 0, n, c, self.spec.dtype)
        self._bias: Any = _matrix(buffer, self._bias_start, 1, n, "float32")[0] if self.spec.bias else None

    def load_rows(self, weight: Tensor, row: int) -> None:
        self._weight[row : row + weight.shape[0]].copy_(weight)

    def load_bias(self, bias: Tensor, row: int) -> None:
        self._bias[row : row + bias.shape[0]].copy_(bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = F.linear(x, self._weight.float(), self._bias)
        return y if out is None else out.copy_(y)

    def rows(self, ids: Tensor) -> Tensor:
        return self._weight.index_select(0, ids.long()).float()


class ReferenceExperts:
    """kernels/ops.Experts. Buffer: per expert gate and up [2F, M], then down [M, F], each 256-byte aligned."""

    def __init__(self, spec: ExpertsSpec) -> None:
        self.spec = spec
        self._dtypes = spec.dtypes * spec.num_experts if len(spec.dtypes) == 1 else spec.dtypes
        self._starts: list[tuple[int, int]] = []
        self.nbytes = 0
        for dtype in self._dtypes:
            down = self.nbytes + _aligned(2 * spec.ffn * spec.hidden * DTYPES[dtype])
            self._starts.append((self.nbytes, down))
            self.nbytes = down + _aligned(spec.hidden * spec.ffn * DTYPES[dtype])

    def bind(self, buffer: Tensor) -> None:
        m, f = self.spec.hidden, self.spec.ffn
        self._gate_up = [_matrix(buffer, s, 2 * f, m, d) for (s, _), d in zip(self._starts, self._dtypes, strict=True)]
        self._down = [_matrix(buffer, s, m, f, d) for (_, s), d in zip(self._starts, self._dtypes, strict=True)]

    def load(self, expert: int, projection: str, weight: Tensor, row: int = 0) -> None:
        matrix = self._down[expert] if projection == "down" else self._gate_up[expert]
        row += {"gate": 0, "up": self.spec.ffn, "down": 0}[projection]
        matrix[row : row + weight.shape[0]].copy_(weight)

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        parts = x.new_zeros(*expert_ids.shape, self.spec.hidden)
        for expert in expert_ids.unique().tolist():
            if expert < 0:
                continue
            token, choice = (expert_ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self._gate_up[expert].float()).chunk(2, dim=-1)
            parts[token, choice] = F.linear(F.silu(gate) * up, self._down[expert].float())
        y = torch.zeros_like(x)
        for choice in range(expert_ids.shape[1]):  # one after the other: the order of the sum is part of the contract
            y += parts[:, choice] * expert_weights[:, choice, None]
        return y
