"""Inputs of a product rounded to codes and scales, as kernels/reference/number_formats.quantize_activation does it.

`round_and_store` is the end of every kernel that makes such inputs: of plain rows here, of norms and gates in kernels/triton/elementwise.
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
        values,
        columns,
        inside,
        codes + row * c,
        scales + row * groups,
        input_scale,
        groups,
        group,
        reach,
        least,
        1,
        STATIC,
        INTEGER,
        LARGEST,
    )


class Rounding:
    """How a linear wants its input: `fmt`, with codes stored as `dtype`. input_scale: of a static format."""

    def __init__(self, fmt: NumberFormat, dtype: torch.dtype, input_scale: Tensor | None = None) -> None:
        self.fmt, self.dtype, self.input_scale = fmt, dtype, input_scale
        integer, static = fmt.is_integer, fmt.scale == "static"
        self.reach = (2.0**fmt.bits - 1) / 2 if integer else FLOAT8_MAX[fmt.element]
        self.least = torch.finfo(torch.float32).eps if integer else LEAST_TOKEN_SCALE
        self.constants: dict[str, Any] = {
            "STATIC": static, "INTEGER": integer, "LARGEST": 2.0 ** (fmt.bits - 1) - 1 if integer else FLOAT8_MAX[fmt.element],
        }  # fmt: skip

    def empty(self, rows: int, c: int, device: torch.device) -> RoundedRows:
        groups = triton.cdiv(c, self.fmt.block[1] or c)
        return RoundedRows(
            torch.empty((rows, c), dtype=self.dtype, device=device), torch.empty((rows, groups), dtype=torch.float32, device=device)
        )

    def arguments(self, out: RoundedRows) -> tuple[Any, ...]:
        """Of kernels that end in `round_and_store`: (codes, scales, input_scale)."""
        codes = out.codes.view(torch.uint8) if out.codes.is_floating_point() and out.codes.itemsize == 1 else out.codes
        return codes, out.scales, out.scales if self.input_scale is None else self.input_scale

    def __call__(self, x: Tensor) -> RoundedRows:
        """x [T, C], rows may be strided."""
        rows, c = x.shape
        width, out = self.fmt.block[1] or c, self.empty(rows, c, x.device)
        groups = out.scales.shape[1]
        if rows:
            round_kernel[(rows, groups)](
                x, x.stride(0), *self.arguments(out), c, groups, self.reach, self.least, **self.constants, WIDTH=width,
                BLOCK=triton.next_power_of_2(width),
            )  # fmt: skip
        return out
