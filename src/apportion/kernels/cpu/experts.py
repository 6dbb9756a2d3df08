"""Grouped expert linears over packed panels (csrc/cpu/experts.h). Knows shapes and addresses; must not know routing or models."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.core.errors import InternalError, InvalidParameter, Unsupported
from apportion.kernels.cpu.extension import load
from apportion.kernels.cpu.linear import ALIGNMENT, DTYPE_CODES, source_of
from apportion.kernels.ops import ExpertsSpec

_PROJECTIONS = {"gate": 0, "up": 1, "down": 2}


class PackedExperts:
    """`kernels.ops.Experts` on the CPU."""

    def __init__(self, team: object, spec: ExpertsSpec) -> None:
        dtypes = spec.dtypes * spec.num_experts if len(spec.dtypes) == 1 else spec.dtypes
        if len(dtypes) != spec.num_experts:
            raise InvalidParameter(f"{len(dtypes)} dtypes were given for {spec.num_experts} experts; give one, or one per expert.")
        for dtype in dtypes:
            if dtype not in DTYPE_CODES:
                raise Unsupported(f"experts of dtype '{dtype}' have no CPU kernel; there are {', '.join(DTYPE_CODES)}.")
        self.spec = spec
        self._kernel = load().Experts(team, [DTYPE_CODES[dtype] for dtype in dtypes], spec.hidden, spec.ffn)
        self.nbytes: int = self._kernel.nbytes
        self._buffer: Tensor | None = None

    def bind(self, buffer: Tensor) -> None:
        """Use `buffer` (uint8 [nbytes]) as storage; its content is kept: it may be already packed."""
        if buffer.dtype != torch.uint8 or buffer.numel() < self.nbytes or not buffer.is_contiguous() or buffer.data_ptr() % ALIGNMENT:
            raise InternalError(f"packed experts need {self.nbytes} contiguous bytes aligned to {ALIGNMENT}.")
        self._buffer = buffer
        self._kernel.bind(buffer.data_ptr())

    def load(self, expert: int, projection: str, weight: Tensor, row: int = 0) -> None:
        """projection: 'gate' or 'up' (weight [n, M], rows row..row+n of F) or 'down' (weight [n, F], rows of M)."""
        if self._buffer is None:
            raise InternalError("experts have no storage yet: bind it first.")
        down = projection == "down"
        rows, columns = (self.spec.hidden, self.spec.ffn) if down else (self.spec.ffn, self.spec.hidden)
        if weight.ndim != 2 or weight.shape[1] != columns or row < 0 or row + weight.shape[0] > rows:
            raise InternalError(f"rows of shape {tuple(weight.shape)} from row {row} on do not fit {projection} of {rows} x {columns}.")
        weight, code = source_of(weight)
        self._kernel.pack(expert, _PROJECTIONS[projection], weight.data_ptr(), code, weight.stride(0), row, weight.shape[0])

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x [T, M], expert_ids int32 [T, k], expert_weights float32 [T, k] -> [T, M]; summed over k in the given order."""
        out = torch.empty((x.shape[0], self.spec.hidden))
        top_k = expert_ids.shape[1]
        self._kernel.run(x.data_ptr(), x.stride(0), expert_ids.data_ptr(), expert_weights.data_ptr(), top_k, out.data_ptr(), x.shape[0])
        return out
