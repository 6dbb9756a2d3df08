"""Inputs of a product rounded to codes and scales, as kernels/reference/number_formats.quantize_activation does it.

`round_and_store` is the end of every kernel that makes such inputs: of plain rows, of norms, of gates and ups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import RoundedRows
from apportion.kernels.reference.number_formats import FLOAT8_MAX, LEAST_TOKEN_SCALE
from apportion.kernels.triton import float8
from apportion.kernels.triton.elementwise import add_rms_norm, gated, normed, num_warps_for, rms_norm, silu_mul

MOST_FUSED = 16384  # inputs of a row that one program holds
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: its last place is 1


@triton.jit
def round_and_store(
    values, columns, inside, codes, scales, input_scale, groups, first_group, reach, least,
    GROUPS: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """values float32 [BLOCK], of one row, which are GROUPS groups from `first_group` of `groups` on; codes and scales begin at the row.

    codes: bfloat16 or int8 numbers of the grid, or bytes of float8. A group with a NaN has the scale NaN, since int8 has none.
    """
    WIDTH: tl.constexpr = values.shape[0] // GROUPS
    tile = tl.reshape(values, (GROUPS, WIDTH))
    if STATIC:
        scale = tl.zeros((GROUPS,), tl.float32) + tl.load(input_scale)
    else:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(tile), axis=1), reach), least)
    ratio = tl.div_rn(tile, tl.zeros_like(tile) + scale[:, None])
    lost = tl.max((ratio != ratio).to(tl.int32), axis=1) > 0
    group = first_group + tl.arange(0, GROUPS)
    tl.store(scales + group, tl.where(lost, float("nan"), scale), mask=group < groups)
    numbers = tl.reshape(ratio, (values.shape[0],))
    if INTEGER:
        held = tl.minimum(tl.maximum(numbers, -LARGEST - 1), LARGEST)
        tl.store(codes + columns, ((held + NEAREST) - NEAREST).to(codes.dtype.element_ty), mask=inside)
    elif codes.dtype.element_ty == tl.uint8:
        tl.store(codes + columns, float8.encode(numbers, LARGEST).to(tl.uint8), mask=inside)
    else:
        tl.store(codes + columns, float8.round_float8(numbers, LARGEST).to(codes.dtype.element_ty), mask=inside)


@triton.jit
def round_kernel(
    x, x_stride, codes, scales, input_scale, c, groups, reach, least,
    WIDTH: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (T, groups) of WIDTH inputs each."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    columns = group * WIDTH + lanes
    inside = (lanes < WIDTH) & (columns < c)
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    round_and_store(
        values, columns, inside, codes + row * c, scales + row * groups, input_scale, groups, group, reach, least,
        1, STATIC, INTEGER, LARGEST,
    )  # fmt: skip


@triton.jit
def norm_round_kernel(
    x, x_stride, residual, residual_stride, weight, codes, scales, input_scale, width, eps, groups, reach, least,
    ADD: tl.constexpr, GROUPS: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < width
    values = normed(x + row * x_stride, residual + row * residual_stride, weight, columns, inside, width, eps, ADD)
    round_and_store(
        values, columns, inside, codes + row * width, scales + row * groups, input_scale, groups, 0, reach, least,
        GROUPS, STATIC, INTEGER, LARGEST,
    )  # fmt: skip


@triton.jit
def gate_round_kernel(
    x, x_stride, codes, scales, input_scale, width, groups, reach, least,
    GROUPS: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (T, blocks of GROUPS groups)."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    round_and_store(
        gated(x + row * x_stride, columns, inside, width), columns, inside, codes + row * width, scales + row * groups, input_scale, groups,
        block * GROUPS, reach, least, GROUPS, STATIC, INTEGER, LARGEST,
    )  # fmt: skip


class Rounding:
    """kernels/ops.Rounding: `fmt`, with codes stored as `dtype`. input_scale: of a static format."""

    def __init__(self, fmt: NumberFormat, dtype: torch.dtype, input_scale: Tensor | None = None) -> None:
        self.fmt, self.dtype, self.input_scale = fmt, dtype, input_scale
        integer = fmt.is_integer
        self._reach = (2.0**fmt.bits - 1) / 2 if integer else FLOAT8_MAX[fmt.element]
        self._least = torch.finfo(torch.float32).eps if integer else LEAST_TOKEN_SCALE
        self._constants: dict[str, Any] = {
            "STATIC": fmt.scale == "static", "INTEGER": integer,
            "LARGEST": 2.0 ** (fmt.bits - 1) - 1 if integer else FLOAT8_MAX[fmt.element],
        }  # fmt: skip

    def __call__(self, x: Tensor) -> RoundedRows:
        rows, c = x.shape
        width, (out, *places) = self.fmt.block[1] or c, self._empty(rows, c, x.device)
        groups = places[1].shape[1]
        if rows:
            round_kernel[(rows, groups)](
                x, x.stride(0), *places, c, groups, self._reach, self._least, **self._constants, WIDTH=width,
                BLOCK=triton.next_power_of_2(width),
            )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> RoundedRows:
        rows, c = x.shape
        block, add = triton.next_power_of_2(c), residual is not None
        if block % self._group(block) or block > MOST_FUSED:
            return self(rms_norm(x, weight, eps) if residual is None else add_rms_norm(x, residual, weight, eps))
        out, *places = self._empty(rows, c, x.device)
        if rows:
            norm_round_kernel[(rows,)](
                x, x.stride(0), x if residual is None else residual, 0 if residual is None else residual.stride(0), weight, *places, c, eps,
                places[1].shape[1], self._reach, self._least, ADD=add, GROUPS=block // self._group(block), **self._constants, BLOCK=block,
                num_warps=num_warps_for(block),
            )  # fmt: skip
        return out

    def silu_mul(self, x: Tensor) -> RoundedRows:
        rows, c = x.shape[0], x.shape[1] // 2
        whole = triton.next_power_of_2(c)
        group = self._group(whole)
        block = max(group, min(1024, whole))
        if block % group or block > MOST_FUSED:
            return self(silu_mul(x))
        out, *places = self._empty(rows, c, x.device)
        if rows:
            gate_round_kernel[(rows, triton.cdiv(c, block))](
                x, x.stride(0), *places, c, places[1].shape[1], self._reach, self._least, GROUPS=block // group, **self._constants,
                BLOCK=block, num_warps=num_warps_for(block),
            )  # fmt: skip
        return out

    def _group(self, whole: int) -> int:
        """Inputs that share a scale, of a row padded to `whole`."""
        return self.fmt.block[1] or whole

    def _empty(self, rows: int, c: int, device: torch.device) -> tuple[RoundedRows, Tensor, Tensor, Tensor]:
        """The result, and what of it the kernels are given: codes, scales, the static scale."""
        codes = torch.empty((rows, c), dtype=self.dtype, device=device)
        scales = torch.empty((rows, triton.cdiv(c, self.fmt.block[1] or c)), dtype=torch.float32, device=device)
        stored = codes.view(torch.uint8) if codes.is_floating_point() and codes.itemsize == 1 else codes
        return RoundedRows(codes, scales), stored, scales, scales if self.input_scale is None else self.input_scale
