"""Linears over packed codes and their scales: the flat GEMM of kernels/triton/linear with the weight widened in registers.

Codes (integers less their zero point, float8) and rounded inputs are exact in bfloat16, so bfloat16 matrix units multiply all of them
exactly into float32 sums; scales come after, once, or for each group of inputs. Where a group does not fill tiles of 32 inputs the product
is taken in float32 of dequantized numbers: right, and slow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.ops import LinearSpec
from apportion.kernels.reference.linear import DequantizedLinear
from apportion.kernels.reference.number_formats import FLOAT8_MAX, LEAST_TOKEN_SCALE
from apportion.kernels.triton import ROUNDED_INPUTS, float8
from apportion.kernels.triton.device import num_multiprocessors
from apportion.kernels.triton.float8 import FLOAT8
from apportion.kernels.triton.linear import add_splits_kernel, choose_splits
from apportion.kernels.triton.tiles import MOST_ROWS, Tile

STEP = 32  # inputs that a group must fill
ZEROS = {"none": 0, "zp": 1, "min": 2}


@triton.jit
def round_input_kernel(
    x, x_stride, codes, scales, input_scale, c, groups, reach, least,
    WIDTH: tl.constexpr, STATIC: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (T, groups): codes bfloat16 [T, C], numbers of the grid, and scales float32 [T, groups]. MANTISSA 0: integers."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    columns = group * WIDTH + lanes
    inside = (lanes < WIDTH) & (columns < c)
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if STATIC:
        scale = tl.load(input_scale)
    else:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), reach), least)
        tl.store(scales + row * groups + group, scale)
    ratio = tl.div_rn(values, tl.zeros_like(values) + scale)
    if MANTISSA > 0:
        rounded = float8.round_float8(ratio, MANTISSA, LEAST, LARGEST)
    else:
        held = tl.minimum(tl.maximum(ratio, -LARGEST - 1), LARGEST)
        rounded = tl.where(ratio != ratio, ratio, (held + 12582912.0) - 12582912.0)  # 1.5 * 2^23: to the nearest integer, ties to even
    tl.store(codes + row * c + columns, rounded.to(tl.bfloat16), mask=inside)


@triton.jit
def _unpack(place, inside_n, k, num_words, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes k .. k + BLOCK_K of rows whose words begin at `place`: int32 [BLOCK_N, BLOCK_K]. k is a multiple of 32."""
    MASK: tl.constexpr = (1 << BITS) - 1
    if 32 % BITS == 0:
        PER: tl.constexpr = 32 // BITS
        at = k // PER + tl.arange(0, BLOCK_K // PER)
        words = tl.load(place[:, None] + at[None, :], mask=inside_n[:, None] & (at < num_words)[None, :], other=0)
        lanes = (words[:, :, None] >> (tl.arange(0, PER) * BITS)[None, None, :]) & MASK
        return tl.reshape(lanes, (BLOCK_N, BLOCK_K))
    else:
        first_bit = (k + tl.arange(0, BLOCK_K)) * BITS
        at, shift = first_bit // 32, (first_bit % 32).to(tl.uint32)
        low = tl.load(place[:, None] + at[None, :], mask=inside_n[:, None] & (at < num_words)[None, :], other=0).to(tl.uint32, bitcast=True)
        high = tl.load(place[:, None] + at[None, :] + 1, mask=inside_n[:, None] & (at + 1 < num_words)[None, :], other=0)
        above = (high.to(tl.uint32, bitcast=True) << 1) << (31 - shift)[None, :]
        return (((low >> shift[None, :]) | above) & MASK).to(tl.int32)


@triton.jit
def _decode(codes, zero, MANTISSA: tl.constexpr, FACTOR: tl.constexpr):
    """Codes as float32: integers count from `zero`."""
    if MANTISSA > 0:
        return float8.decode(codes, MANTISSA, FACTOR)
    else:
        return codes.to(tl.float32) - zero


@triton.jit
def coded_sums(
    x, x_stride, x_rows, inside_t, x_scale, codes, scale, zero, outputs, n, first, last, num_words, num_scales,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, N_BLOCK: tl.constexpr, K_GROUP: tl.constexpr,
    X_SCALES: tl.constexpr, X_GROUP: tl.constexpr, ROUND: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums [BLOCK_N, BLOCK_T] over inputs [first, last), scales applied. codes int32 [N, num_words]; scale, zero [.., num_scales].

    N_BLOCK, K_GROUP: outputs and inputs that share a scale, 0 for all. X_SCALES: of a row of x, 0 where it is not rounded, -1: one for all.
    X_GROUP: inputs that share one of several. WIDE: products of dequantized numbers in float32.
    """
    inner, inside_n = tl.arange(0, BLOCK_K), outputs < n
    GROUPED: tl.constexpr = K_GROUP > 0 or X_SCALES > 1
    place = codes + outputs.to(tl.int64) * num_words
    s_place = (outputs // N_BLOCK if N_BLOCK > 0 else outputs * 0).to(tl.int64) * num_scales
    middle = tl.zeros((BLOCK_N,), tl.float32) + (0 if ZERO == 2 else 1 << (BITS - 1))
    sums, x_sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for k in range(first, last, BLOCK_K):
        inside_k = k + inner < last
        seen = tl.load(x + x_rows[None, :] * x_stride + (k + inner)[:, None], mask=inside_k[:, None] & inside_t[None, :], other=0.0)
        if ROUND:
            seen = seen.to(tl.bfloat16)
        ints = _unpack(place, inside_n, k, num_words, BITS, BLOCK_N, BLOCK_K)
        if WIDE:
            group = s_place[:, None] + ((k + inner) // K_GROUP if K_GROUP > 0 else inner * 0)[None, :]
            mask = inside_n[:, None] & inside_k[None, :]
            base = tl.load(zero + group, mask=mask, other=0).to(tl.float32) if ZERO == 1 else middle[:, None]
            wide = _decode(ints, base, MANTISSA, FACTOR) * tl.load(scale + group, mask=mask, other=0.0).to(tl.float32)
            if ZERO == 2:
                wide += tl.load(zero + group, mask=mask, other=0.0).to(tl.float32)
            seen = seen.to(tl.float32)
            if X_SCALES > 1:
                at = x_rows[None, :] * X_SCALES + ((k + inner) // X_GROUP)[:, None]
                seen *= tl.load(x_scale + at, mask=inside_k[:, None] & inside_t[None, :], other=0.0)
            sums = tl.dot(wide, seen, sums, input_precision="ieee")
        else:
            group = s_place + (k // K_GROUP if K_GROUP > 0 else 0)
            base = tl.load(zero + group, mask=inside_n, other=0).to(tl.float32) if ZERO == 1 else middle
            values = _decode(ints, base[:, None], MANTISSA, FACTOR).to(tl.bfloat16)
            if GROUPED:
                part = tl.dot(values, seen) * tl.load(scale + group, mask=inside_n, other=0.0).to(tl.float32)[:, None]
                if ZERO == 2:
                    least = tl.load(zero + group, mask=inside_n, other=0.0).to(tl.float32)
                    part += least[:, None] * tl.sum(seen.to(tl.float32), axis=0)[None, :]
                if X_SCALES > 1:
                    part *= tl.load(x_scale + x_rows * X_SCALES + k // X_GROUP, mask=inside_t, other=0.0)[None, :]
                sums += part
            else:
                sums = tl.dot(values, seen, sums)
                if ZERO == 2:
                    x_sums += tl.sum(seen.to(tl.float32), axis=0)
    if X_SCALES == 1:
        sums *= tl.load(x_scale + x_rows, mask=inside_t, other=0.0)[None, :]
    elif X_SCALES == -1:
        sums *= tl.load(x_scale)
    if not WIDE and not GROUPED:
        sums *= tl.load(scale + s_place, mask=inside_n, other=0.0).to(tl.float32)[:, None]
        if ZERO == 2:
            sums += tl.load(zero + s_place, mask=inside_n, other=0.0).to(tl.float32)[:, None] * x_sums[None, :]
    return sums


@triton.jit
def coded_kernel(
    x, x_stride, x_scale, codes, scale, zero, bias, out, out_stride, rows, n, c, num_words, num_scales, c_per_split,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, N_BLOCK: tl.constexpr, K_GROUP: tl.constexpr,
    X_SCALES: tl.constexpr, X_GROUP: tl.constexpr, ROUND: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, C] @ weight [N, C]^T (+ bias); with several splits, out is float32 [SPLITS, T, N] and gets no bias."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    tokens = (tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside_n, inside_t = outputs < n, tokens < rows
    first = split * c_per_split
    sums = coded_sums(
        x, x_stride, tokens, inside_t, x_scale, codes, scale, zero, outputs, n, first, tl.minimum(first + c_per_split, c), num_words,
        num_scales, BITS, MANTISSA, FACTOR, ZERO, N_BLOCK, K_GROUP, X_SCALES, X_GROUP, ROUND, WIDE, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        sums += tl.load(bias + outputs, mask=inside_n, other=0.0)[:, None]
    row = (split * rows if SPLITS > 1 else 0) + tokens
    tl.store(out + row[None, :] * out_stride + outputs[:, None], sums.to(out.dtype.element_ty), mask=inside_n[:, None] & inside_t[None, :])


def weight_constants(fmt: NumberFormat) -> dict[str, Any]:
    """What the kernels are compiled for, of a weight's format."""
    mantissa, _, factor = FLOAT8.get(fmt.element, (0, 0, 1.0))
    return {
        "BITS": fmt.bits, "MANTISSA": mantissa, "FACTOR": factor, "ZERO": ZEROS[fmt.zero], "N_BLOCK": fmt.block[0],
        "K_GROUP": fmt.block[1], "ROUND": fmt.element in ROUNDED_INPUTS,
    }  # fmt: skip


def round_input(x: Tensor, fmt: NumberFormat, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """reference/number_formats.quantize_activation with codes in bfloat16, which holds them all; scales [T, G], or the static one."""
    rows, c = x.shape
    width = fmt.block[1] or c
    groups = triton.cdiv(c, width)
    mantissa, least_exponent, _ = FLOAT8.get(fmt.element, (0, 0, 1.0))
    codes = torch.empty((rows, c), dtype=torch.bfloat16, device=x.device)
    static = fmt.scale == "static"
    scales = input_scale if static and input_scale is not None else torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    integer = fmt.is_integer
    round_input_kernel[(rows, groups)](
        x, x.stride(0), codes, scales, scales, c, groups, (2.0**fmt.bits - 1) / 2 if integer else FLOAT8_MAX[fmt.element],
        torch.finfo(torch.float32).eps if integer else LEAST_TOKEN_SCALE, WIDTH=width, STATIC=static, MANTISSA=mantissa,
        LEAST=least_exponent, LARGEST=2.0 ** (fmt.bits - 1) - 1 if integer else FLOAT8_MAX[fmt.element],
        BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return codes, scales


class CodedLinear(DequantizedLinear):
    """kernels/ops.Linear of every scheme with scales, in the buffer of the reference."""

    def __init__(self, spec: LinearSpec, tile: Tile) -> None:
        super().__init__(spec, _no_linear)
        weight, activation = self.scheme.weight, self.scheme.activation
        if weight.is_float or spec.gated:
            raise Unsupported(
                f"a {'gated ' * spec.gated}linear in {spec.scheme} has no Triton kernel; a dtype alone, or codes with scales, have"
            )
        if activation is not None and activation.is_float:
            raise Unsupported(f"inputs rounded to {activation.name} have no Triton kernel")
        self.constants = weight_constants(weight)
        groups = [g for g in (weight.block[1], activation.block[1] if activation else 0) if g]
        self.wide = any(g % STEP for g in groups) or not (self.constants["ROUND"] or activation)
        self.constants["ROUND"] |= activation is not None
        straddling = 32 % weight.bits > 0  # codes over two words: both are read for each code
        k = min(tile.k, 32 if self.wide or straddling else 64 if weight.zero != "none" else tile.k)  # more does not fit the registers
        while not self.wide and any(g % k for g in groups):
            k //= 2
        self.tile = replace(tile, k=k, num_stages=2 if self.wide or straddling else tile.num_stages)
        self.num_words = -(-spec.in_features * weight.bits // 32)
        self.num_scales = weight.scale_shape(spec.out_features, spec.in_features)[1]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        rows, (n, c) = x.shape[0], (self.spec.out_features, self.spec.in_features)
        if out is None:
            out = torch.empty((rows, n), dtype=torch.float32, device=x.device)
        if not rows:
            return out
        stored, tile = self._stored, self.tile
        if self.scheme.weight.permuted:
            x = x.index_select(1, stored["order"])
        x_scale, x_scales, x_group = x, 0, 0
        if self.scheme.activation is not None:
            x, x_scale = round_input(x, self.scheme.activation, stored.get("input_scale"))
            x_scales = -1 if self.scheme.activation.scale == "static" else x_scale.shape[1]
            x_group = self.scheme.activation.block[1]
        splits = choose_splits(n, c, num_multiprocessors(x.device), tile)
        per_split = triton.cdiv(triton.cdiv(c, splits), tile.k) * tile.k
        splits = triton.cdiv(c, per_split)
        parts = out if splits == 1 else torch.empty((splits, rows, n), dtype=torch.float32, device=x.device)
        block_t = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
        bias = stored.get("bias")
        coded_kernel[(triton.cdiv(n, tile.n), splits, triton.cdiv(rows, block_t))](
            x, x.stride(0), x_scale, stored["codes"], stored["scale"], stored.get("zero", stored["scale"]),
            stored["scale"] if bias is None else bias, parts, parts.stride(-2), rows, n, c, self.num_words, self.num_scales, per_split,
            **self.constants, X_SCALES=x_scales, X_GROUP=x_group, WIDE=self.wide, HAS_BIAS=bias is not None and splits == 1, SPLITS=splits,
            BLOCK_T=block_t, BLOCK_N=tile.n, BLOCK_K=tile.k, **tile.launch,
        )  # fmt: skip
        if splits > 1:
            block = min(1024, triton.next_power_of_2(n))
            add_splits_kernel[(rows, triton.cdiv(n, block))](
                parts, parts if bias is None else bias, out, out.stride(0), rows, n, HAS_BIAS=bias is not None, SPLITS=splits, BLOCK=block
            )
        return out


def _no_linear(spec: LinearSpec) -> Any:
    raise Unsupported(f"no linear in {spec.scheme} is needed here")


def method(scheme: str) -> str:
    """How a linear of a scheme is computed, in words."""
    parsed = Scheme.parse(scheme)
    groups = [fmt.block[1] for fmt in (parsed.weight, parsed.activation) if fmt is not None and fmt.block[1] % STEP]
    if groups:
        return f"dequantized in registers, multiplied in float32: groups of {groups[0]} inputs do not fill {STEP}"
    return "codes widened in registers, multiplied in bfloat16"
