"""Grouped expert linears over packed panels (csrc/cpu/experts.h). Knows shapes and addresses; must not know routing or models."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.core.errors import InternalError, Unsupported
from apportion.kernels.cpu.extension import load
from apportion.kernels.cpu.formats import code_source, obstacle, weight_format
from apportion.kernels.cpu.linear import ALIGNMENT, source_of
from apportion.kernels.ops import WEIGHT_DTYPES, ExpertsSpec, QuantizedWeight

_PROJECTIONS = {"gate": 0, "up": 1, "down": 2}


class PackedExperts:
    """`kernels.ops.Experts` on the CPU."""

    def __init__(self, team: object, spec: ExpertsSpec) -> None:
        for scheme in {scheme for schemes in spec.schemes for scheme in schemes}:
            if why := obstacle(scheme):
                raise Unsupported(f"experts in '{scheme}' have no grouped CPU kernel: {why}.")
        self.spec = spec
        formats = [weight_format(scheme) for expert in range(spec.num_experts) for scheme in spec.schemes_of(expert)]
        self._kernel = load().Experts(team, formats, spec.hidden, spec.ffn)
        self.nbytes: int = self._kernel.nbytes
        self._buffer: Tensor | None = None

    def bind(self, buffer: Tensor) -> None:
        """Use `buffer` (uint8 [nbytes]) as storage; its content is kept: it may be already packed."""
        if buffer.dtype != torch.uint8 or buffer.numel() < self.nbytes or not buffer.is_contiguous() or buffer.data_ptr() % ALIGNMENT:
            raise InternalError(f"packed experts need {self.nbytes} contiguous bytes aligned to {ALIGNMENT}.")
        self._buffer = buffer
        self._kernel.bind(buffer.data_ptr())

    def load(self, expert: int, projection: str, weight: Tensor | QuantizedWeight, row: int = 0) -> None:
        """projection: 'gate' or 'up' (weight [n, M], rows row..row+n of F) or 'down' (weight [n, F], rows of M)."""
        if self._buffer is None:
            raise InternalError("experts have no storage yet: bind it first.")
        down = projection == "down"
        rows, columns = (self.spec.hidden, self.spec.ffn) if down else (self.spec.ffn, self.spec.hidden)
        shape, which = weight.codes.shape if isinstance(weight, QuantizedWeight) else weight.shape, _PROJECTIONS[projection]
        if len(shape) != 2 or shape[1] != columns or row < 0 or row + shape[0] > rows:
            raise InternalError(f"rows of shape {tuple(shape)} from row {row} on do not fit {projection} of {rows} x {columns}.")
        scheme = self.spec.schemes_of(expert)[which]
        if isinstance(weight, QuantizedWeight):
            if row % (weight.format.block[0] or rows):
                raise InternalError(
                    f"rows of {weight.format.name} cannot start at {row}: a scale holds for {weight.format.block[0] or rows}."
                )
            source, _kept = code_source(weight, scheme)
            self._kernel.pack_codes(expert, which, source, row, shape[0])
            return
        if scheme not in WEIGHT_DTYPES:
            raise InternalError(f"experts of {scheme} were given rows in floating point.")
        weight, code = source_of(weight)
        self._kernel.pack(expert, which, weight.data_ptr(), code, weight.stride(0), row, weight.shape[0])

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x [T, M], expert_ids int32 [T, k], expert_weights float32 [T, k] -> [T, M]; summed over k in the given order."""
        out = torch.empty((x.shape[0], self.spec.hidden))
        top_k = expert_ids.shape[1]
        self._kernel.run(x.data_ptr(), x.stride(0), expert_ids.data_ptr(), expert_weights.data_ptr(), top_k, out.data_ptr(), x.shape[0])
        return out
