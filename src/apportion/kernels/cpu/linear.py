"""Linear over packed panels (csrc/cpu/linear.h). Knows shapes and addresses; must not know layers, models or quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.core.errors import InternalError, InvalidParameter, Unsupported
from apportion.kernels.cpu.extension import load
from apportion.kernels.ops import LinearSpec

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
SOURCE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALIGNMENT = 64  # bytes a vector load wants; arenas give 256


def source_of(weight: Tensor) -> tuple[Tensor, int]:
    """A weight as the packing kernels read it: one of the three float dtypes, contiguous in its last axis."""
    if weight.dtype not in SOURCE_CODES:
        if not weight.is_floating_point():
            raise Unsupported(f"a linear's weight must be floating point, not {weight.dtype}.")
        weight = weight.to(torch.float32)
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    return weight, SOURCE_CODES[weight.dtype]


class PackedLinear:
    """`kernels.ops.Linear` on the CPU. `team`: the `_cpu.ThreadTeam` of the lane that calls it."""

    def __init__(self, team: object, spec: LinearSpec) -> None:
        if spec.dtype not in DTYPE_CODES:
            raise Unsupported(f"weights of dtype '{spec.dtype}' have no CPU kernel; there are {', '.join(DTYPE_CODES)}.")
        if spec.out_features < 1 or spec.in_features < 1:
            raise InvalidParameter(f"a linear of {spec.out_features} x {spec.in_features} features is empty.")
        self.spec = spec
        self._kernel = load().Linear(team, DTYPE_CODES[spec.dtype], spec.out_features, spec.in_features, spec.bias)
        self._run = self._kernel.run
        self._out_features = spec.out_features
        self.nbytes: int = self._kernel.nbytes
        self._buffer: Tensor | None = None

    def bind(self, buffer: Tensor) -> None:
        """Use `buffer` (uint8 [nbytes], 256-byte aligned) as storage; its content is kept: it may be already packed."""
        if buffer.dtype != torch.uint8 or buffer.numel() < self.nbytes or not buffer.is_contiguous() or buffer.data_ptr() % ALIGNMENT:
            raise InternalError(f"a packed weight needs {self.nbytes} contiguous bytes aligned to {ALIGNMENT}.")
        self._buffer = buffer
        self._kernel.bind(buffer.data_ptr())

    def load_rows(self, weight: Tensor, row: int) -> None:
        """Pack weight [n, C] (any float dtype) as output rows row..row+n."""
        self._check_rows(weight.shape[0], row)
        if weight.ndim != 2 or weight.shape[1] != self.spec.in_features:
            raise InternalError(f"rows of shape {tuple(weight.shape)} do not fit a weight of {self.spec.in_features} input features.")
        weight, code = source_of(weight)
        self._kernel.pack(weight.data_ptr(), code, weight.stride(0), row, weight.shape[0])

    def load_bias(self, bias: Tensor, row: int) -> None:
        """Store bias [n] (any float dtype) for output rows row..row+n; rows past the last are zeroed with it."""
        self._check_rows(bias.shape[0], row)
        if not self.spec.bias:
            raise InternalError("a bias was given to a linear without one.")
        assert self._buffer is not None
        padded = -(-self.spec.out_features // 32) * 32
        panels = padded * (-(-self.spec.in_features // 32) * 32) * (4 if self.spec.dtype == "float32" else 2)
        stored = self._buffer[panels : panels + 4 * padded].view(torch.float32)
        stored[row : row + bias.shape[0]] = bias.to(torch.float32)
        if row + bias.shape[0] == self.spec.out_features:
            stored[self.spec.out_features :] = 0

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, C] -> [T, N] float32; both may be views with a row stride."""
        rows = x.shape[0]
        if out is None:
            out = torch.empty((rows, self._out_features))
        self._run(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), rows)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int32 [T]) of the weight as float32 [T, C]."""
        out = torch.empty((ids.shape[0], self.spec.in_features))
        self._kernel.gather(ids.data_ptr(), ids.shape[0], out.data_ptr())
        return out

    def _check_rows(self, count: int, row: int) -> None:
        if self._buffer is None:
            raise InternalError("a linear has no storage yet: bind it first.")
        if row < 0 or row + count > self.spec.out_features:
            raise InternalError(f"rows {row} to {row + count} do not fit a weight of {self.spec.out_features} output features.")
