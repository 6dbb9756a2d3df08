"""Linear over packed panels (csrc/cpu/linear.h). Knows shapes and addresses; must not know layers, models or quantization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apportion.core.errors import InternalError, InvalidParameter, Unsupported
from apportion.core.number_format import Scheme
from apportion.kernels.cpu.extension import load
from apportion.kernels.cpu.formats import code_source, obstacle, weight_format
from apportion.kernels.interval_table import GEMV, Choice
from apportion.kernels.ops import LinearSpec, QuantizedWeight

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
    """`kernels.ops.Linear` on the CPU. `team`: the `_cpu.ThreadTeam` of the lane that calls it.

    choose: what multiplies how many tokens, GEMV or FLAT; None: a GEMV as far as the registers hold its rows.
    """

    rounding = None

    def __init__(self, team: object, spec: LinearSpec, choose: Callable[[int], Choice] | None = None) -> None:
        if why := obstacle(spec.scheme):
            raise Unsupported(f"weights in '{spec.scheme}' have no packed CPU kernels: {why}.")
        if spec.out_features < 1 or spec.in_features < 1:
            raise InvalidParameter(f"a linear of {spec.out_features} x {spec.in_features} features is empty.")
        if spec.gated and spec.out_features % 2:
            raise InvalidParameter(f"a gated linear has as many gates as ups, not {spec.out_features} rows in all.")
        self.spec = spec
        self._format = Scheme.parse(spec.scheme).weight
        self._kernel = load().Linear(team, weight_format(spec.scheme), spec.out_features, spec.in_features, spec.bias, spec.gated)
        self._run = self._kernel.run
        self.gemv_rows: int = self._kernel.gemv_rows
        if choose is not None:
            self.set_gemv(sum(1 << (rows - 1) for rows in range(1, self.gemv_rows + 1) if choose(rows) == GEMV))
        self._width = spec.width
        self.nbytes: int = self._kernel.nbytes
        self._buffer: Tensor | None = None

    def bind(self, buffer: Tensor) -> None:
        """Use `buffer` (uint8 [nbytes], 256-byte aligned) as storage; its content is kept: it may be already packed."""
        if buffer.dtype != torch.uint8 or buffer.numel() < self.nbytes or not buffer.is_contiguous() or buffer.data_ptr() % ALIGNMENT:
            raise InternalError(f"a packed weight needs {self.nbytes} contiguous bytes aligned to {ALIGNMENT}.")
        self._buffer = buffer
        self._kernel.bind(buffer.data_ptr())

    def set_gemv(self, rows: int) -> None:
        """Bit r - 1: r rows are multiplied as a GEMV. No bit of a result depends on it."""
        self._kernel.set_gemv(rows)

    def copy_to(self, other: PackedLinear) -> None:
        """The packed bytes of this linear into another of the same spec."""
        if self._buffer is None or other._buffer is None or other.spec != self.spec:
            raise InternalError("packed bytes are copied between bound linears of one spec.")
        other._buffer[: self.nbytes].copy_(self._buffer[: self.nbytes])

    def load_rows(self, weight: Tensor | QuantizedWeight, row: int) -> None:
        """Pack weight [n, C] (any float dtype, or codes of the scheme) as rows row..row+n."""
        shape = weight.codes.shape if isinstance(weight, QuantizedWeight) else weight.shape
        self._check_rows(shape[0], row)
        if len(shape) != 2 or shape[1] != self.spec.in_features:
            raise InternalError(f"rows of shape {tuple(shape)} do not fit a weight of {self.spec.in_features} input features.")
        if not self._format.is_float:
            self._check_block(row)
            source, kept = code_source(weight, self.spec.scheme)
            self._kernel.pack_codes(source, row, len(kept[0]))
            return
        if isinstance(weight, QuantizedWeight):
            raise InternalError(f"a linear of {self.spec.scheme} was given rows in {weight.format.name}.")
        weight, code = source_of(weight)
        self._kernel.pack(weight.data_ptr(), code, weight.stride(0), row, weight.shape[0])

    def load_bias(self, bias: Tensor, row: int) -> None:
        """Store bias [n] (any float dtype) for rows row..row+n of the weight; the padding is zeroed."""
        self._check_rows(bias.shape[0], row)
        if not self.spec.bias:
            raise InternalError("a bias was given to a linear without one.")
        assert self._buffer is not None
        count, width = self.spec.out_features // self._width, self._width  # of matrices: gates and ups are two
        padded = -(-width // 32) * 32
        start_byte = self._kernel.bias_start
        stored = self._buffer[start_byte : start_byte + 4 * count * padded].view(torch.float32).view(count, padded)
        for matrix in range(count):
            first, last = max(0, row - matrix * width), min(width, row + bias.shape[0] - matrix * width)
            if first < last:
                start = first + matrix * width - row
                stored[matrix, first:last] = bias[start : start + last - first].to(torch.float32)
                stored[matrix, width:] = 0

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, C] -> [T, spec.width] float32; both may be views with a row stride."""
        rows = x.shape[0]
        if out is None:
            out = torch.empty((rows, self._width))
        self._run(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), rows)
        return out

    def rows(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows `ids` (int32 [T]) of the weight as float32 [T, C]."""
        if self.spec.gated:
            raise InternalError("a gated linear gives no rows of its weight.")
        if out is None:
            out = torch.empty((ids.shape[0], self.spec.in_features))
        self._kernel.gather(ids.data_ptr(), ids.shape[0], out.data_ptr())
        return out

    def _check_block(self, row: int) -> None:
        step = self._format.block[0] or self.spec.out_features
        if row % step:
            raise InternalError(f"rows of {self._format.name} must start at a multiple of {step}, not at {row}")

    def _check_rows(self, count: int, row: int) -> None:
        if self._buffer is None:
            raise InternalError("a linear has no storage yet: bind it first.")
        if row < 0 or row + count > self.spec.out_features:
            raise InternalError(f"rows {row} to {row + count} do not fit a weight of {self.spec.out_features} output features.")
