"""Linears over packed codes and their scales: the flat GEMM of kernels/triton/linear with what the scheme's numbers need.

What is multiplied, `product_of`: 8-bit numbers as they stand in memory where the input is rounded to the weight's element and the matrix
units take it; smaller integers widened to int8 in registers for an input of integers; all else widened to bfloat16, which holds integers
and float8 exactly, so that sums in float32 are those of the codes. Scales come after, once, or for each group of inputs. Where a group does
not fill tiles of 32 inputs the product is taken in float32 of dequantized numbers: right, and slow. The library multiplies float8 by float8
without groups where the dispatch table says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.interval_table import LIBRARY, Choice
from apportion.kernels.ops import LinearSpec, RoundedRows
from apportion.kernels.reference.linear import DequantizedLinear
from apportion.kernels.reference.number_formats import FLOAT8 as FLOAT8_DTYPES
from apportion.kernels.triton import ROUNDED_INPUTS, float8
from apportion.kernels.triton.device import num_multiprocessors
from apportion.kernels.triton.float8 import FLOAT8
from apportion.kernels.triton.linear import add_splits_kernel, choose_splits
from apportion.kernels.triton.rounding import Rounding
from apportion.kernels.triton.tiles import MOST_ROWS, Tile

STEP = 32  # inputs that a group must fill
LIBRARY_STEP = 16  # what outputs and inputs must be multiples of for torch._scaled_mm
ZEROS = {"none": 0, "zp": 1, "min": 2}


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
def _dot(values, seen, sums):
    if values.dtype == tl.int8:
        return tl.dot(values, seen, sums, out_dtype=tl.int32)
    else:  # Hopper adds float8 products in 14 bits, here those of one tile
        return tl.dot(values, seen, sums, max_num_imprecise_acc=values.shape[1])


@triton.jit
def _widen(codes, zero, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, dtype: tl.constexpr):
    """Codes as int8 where the input is, else as bfloat16."""
    if dtype == tl.int8:
        return (codes - zero.to(tl.int32)).to(tl.int8)
    else:
        return _decode(codes, zero, MANTISSA, FACTOR).to(tl.bfloat16)


@triton.jit
def _dequantize(codes, scale, zero, inside, BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr):
    """Codes [N, K] as float32; scale and zero point at those of each."""
    base = 0 if ZERO == 2 else 1 << (BITS - 1)
    if ZERO == 1:
        base = tl.load(zero, mask=inside, other=0).to(tl.float32)
    values = _decode(codes, base, MANTISSA, FACTOR) * tl.load(scale, mask=inside, other=0.0).to(tl.float32)
    if ZERO == 2:
        values += tl.load(zero, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def coded_sums(
    x, x_stride, x_rows, inside_t, x_scale, codes, scale, zero, outputs, n, first, last, width, num_scales,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, N_BLOCK: tl.constexpr, K_GROUP: tl.constexpr,
    X_SCALES: tl.constexpr, X_GROUP: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums [BLOCK_N, BLOCK_T] over inputs [first, last), scales applied. codes [N, width]: words, or with PRODUCT 'bytes' 8-bit numbers.
    scale, zero [.., num_scales]. N_BLOCK, K_GROUP: outputs and inputs that share a scale, 0 for all. X_SCALES: of a row of x, 0 where it
    is not rounded. X_GROUP: inputs that share one of several. PRODUCT: `product_of`.
    """
    inner, inside_n = tl.arange(0, BLOCK_K), outputs < n
    GROUPED: tl.constexpr = K_GROUP > 0 or X_SCALES > 1
    INTEGER: tl.constexpr = x.dtype.element_ty == tl.int8
    place = codes + outputs.to(tl.int64) * width
    s_place = (outputs // N_BLOCK if N_BLOCK > 0 else outputs * 0).to(tl.int64) * num_scales
    middle = tl.zeros((BLOCK_N,), tl.float32) + (0 if ZERO == 2 else 1 << (BITS - 1))
    none = tl.zeros((BLOCK_N, BLOCK_T), tl.int32 if INTEGER else tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.int32 if INTEGER and not GROUPED else tl.float32)
    x_sums = tl.zeros((BLOCK_T,), tl.float32)
    for k in range(first, last, BLOCK_K):
        inside_k = k + inner < last
        seen = tl.load(x + x_rows[None, :] * x_stride + (k + inner)[:, None], mask=inside_k[:, None] & inside_t[None, :], other=0.0)
        if PRODUCT == "float32":
            group = s_place[:, None] + ((k + inner) // K_GROUP if K_GROUP > 0 else inner * 0)[None, :]
            ints = _unpack(place, inside_n, k, width, BITS, BLOCK_N, BLOCK_K)
            wide = _dequantize(ints, scale + group, zero + group, inside_n[:, None] & inside_k[None, :], BITS, MANTISSA, FACTOR, ZERO)
            seen = seen.to(tl.float32)
            if X_SCALES > 1:
                at = x_rows[None, :] * X_SCALES + ((k + inner) // X_GROUP)[:, None]
                seen *= tl.load(x_scale + at, mask=inside_k[:, None] & inside_t[None, :], other=0.0)
            sums = tl.dot(wide, seen, sums, input_precision="ieee")
        else:
            group = s_place + (k // K_GROUP if K_GROUP > 0 else 0)
            if PRODUCT == "bytes":
                values = tl.load(place[:, None] + (k + inner)[None, :], mask=inside_n[:, None] & inside_k[None, :], other=0.0)
            else:
                base = tl.load(zero + group, mask=inside_n, other=0).to(tl.float32) if ZERO == 1 else middle
                ints = _unpack(place, inside_n, k, width, BITS, BLOCK_N, BLOCK_K)
                values = _widen(ints, base[:, None], MANTISSA, FACTOR, seen.dtype)
                seen = seen.to(values.dtype)
            if GROUPED:
                part = _dot(values, seen, none).to(tl.float32) * tl.load(scale + group, mask=inside_n, other=0.0).to(tl.float32)[:, None]
                if ZERO == 2:
                    part += tl.load(zero + group, mask=inside_n, other=0.0).to(tl.float32)[:, None] * tl.sum(seen.to(tl.float32), axis=0)
                if X_SCALES > 1:
                    part *= tl.load(x_scale + x_rows * X_SCALES + k // X_GROUP, mask=inside_t, other=0.0)[None, :]
                sums += part
            else:
                sums = _dot(values, seen, sums)
                if ZERO == 2:
                    x_sums += tl.sum(seen.to(tl.float32), axis=0)
    scaled = sums.to(tl.float32)
    if X_SCALES == 1:
        factor = tl.load(x_scale + x_rows, mask=inside_t, other=0.0)
        scaled, x_sums = scaled * factor, x_sums * factor
    if PRODUCT != "float32" and not GROUPED:
        scaled *= tl.load(scale + s_place, mask=inside_n, other=0.0).to(tl.float32)[:, None]
        if ZERO == 2:
            scaled += tl.load(zero + s_place, mask=inside_n, other=0.0).to(tl.float32)[:, None] * x_sums
    return scaled


@triton.jit
def coded_kernel(
    x, x_stride, x_scale, codes, scale, zero, bias, out, out_stride, rows, n, c, width, num_scales, c_per_split,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, N_BLOCK: tl.constexpr, K_GROUP: tl.constexpr,
    X_SCALES: tl.constexpr, X_GROUP: tl.constexpr, PRODUCT: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, C] @ weight [N, C]^T (+ bias); with several splits, out is float32 [SPLITS, T, N] and gets no bias."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    tokens = (tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside_n, inside_t = outputs < n, tokens < rows
    first = split * c_per_split
    sums = coded_sums(
        x, x_stride, tokens, inside_t, x_scale, codes, scale, zero, outputs, n, first, tl.minimum(first + c_per_split, c), width,
        num_scales, BITS, MANTISSA, FACTOR, ZERO, N_BLOCK, K_GROUP, X_SCALES, X_GROUP, PRODUCT, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        sums += tl.load(bias + outputs, mask=inside_n, other=0.0)[:, None]
    row = (split * rows if SPLITS > 1 else 0) + tokens
    tl.store(out + row[None, :] * out_stride + outputs[:, None], sums.to(out.dtype.element_ty), mask=inside_n[:, None] & inside_t[None, :])


@triton.jit
def scale_kernel(sums, x_scale, scale, bias, out, out_stride, n, N_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, N] = sums [T, N] * x_scale [T] * scale [N or 1] (+ bias), what the library leaves to do."""
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < n
    factor = tl.load(x_scale + token) * tl.load(scale + (outputs if N_BLOCK > 0 else outputs * 0), mask=inside, other=0.0).to(tl.float32)
    total = tl.load(sums + token * n + outputs, mask=inside, other=0.0) * factor
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=inside, other=0.0)
    tl.store(out + token * out_stride + outputs, total.to(out.dtype.element_ty), mask=inside)


def product_of(scheme: Scheme, units: Collection[str]) -> str:
    """What a kernel multiplies: 'bytes' as they stand, 'int8' or 'bfloat16' widened in registers, 'float32' dequantized.

    units: elements of float8 that the matrix units take; all take int8.
    """
    weight, rounded = scheme.weight, scheme.activation
    if any(fmt.block[1] % STEP for fmt in (weight, rounded) if fmt is not None and fmt.block[1]):
        return "float32"
    if rounded is None:
        return "bfloat16" if weight.element in ROUNDED_INPUTS else "float32"
    if rounded.is_integer and weight.is_integer:  # zero points beside 8 bits leave those of int8
        return "int8" if weight.bits < 8 else "bytes" if weight.zero == "none" else "bfloat16"
    return "bytes" if rounded.element == weight.element and weight.element in units else "bfloat16"


def weight_constants(fmt: NumberFormat) -> dict[str, Any]:
    """What the kernels are compiled for, of a weight's format."""
    mantissa, factor = FLOAT8.get(fmt.element, (0, 1.0))
    return {
        "BITS": fmt.bits, "MANTISSA": mantissa, "FACTOR": factor, "ZERO": ZEROS[fmt.zero], "N_BLOCK": fmt.block[0],
        "K_GROUP": fmt.block[1],
    }  # fmt: skip


def fitted(tile: Tile, scheme: Scheme, product: str) -> Tile:
    """A tile of the flat GEMM whose inputs do not cross groups and whose codes fit the registers."""
    weight = scheme.weight
    straddling = product != "bytes" and 32 % weight.bits > 0  # codes over two words: both are read for each code
    small = product == "float32" or straddling
    k = min(tile.k, 32 if small else 64 if weight.zero != "none" else tile.k)
    groups = [fmt.block[1] for fmt in (weight, scheme.activation) if fmt is not None and fmt.block[1]]
    while product != "float32" and any(g % k for g in groups):
        k //= 2
    return replace(tile, k=k, num_stages=2 if small else tile.num_stages)


class CodedLinear(DequantizedLinear):
    """kernels/ops.Linear of every scheme with scales, in the buffer of the reference, but for integers that are multiplied as they stand:
    those count from 0.

    choose: tokens -> what multiplies, as measured. Without it the flat kernel does for as many tokens as its tiles have, and for more the
    library, if `library`: only where `library_obstacle` is empty. units: as `product_of` takes them.
    """

    def __init__(
        self, spec: LinearSpec, tiles: Sequence[Tile], units: Collection[str], choose: Callable[[int], Choice] | None = None,
        library: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(spec, _no_linear)
        weight, activation = self.scheme.weight, self.scheme.activation
        if weight.is_float or spec.gated:
            raise Unsupported(
                f"a {'gated ' * spec.gated}linear in {spec.scheme} has no Triton kernel; a dtype alone, or codes with scales, have"
            )
        if activation is not None and activation.is_float:
            raise Unsupported(f"inputs rounded to {activation.name} have no Triton kernel; take device=cpu")
        self.product = product_of(self.scheme, units)
        self.constants = {**weight_constants(weight), "PRODUCT": self.product}
        self.tiles = [fitted(tile, self.scheme, self.product) for tile in tiles]
        self.num_scales = weight.scale_shape(spec.out_features, spec.in_features)[1]
        as_bytes = torch.int8 if weight.is_integer else FLOAT8_DTYPES[weight.element]
        self.code_dtype = as_bytes if self.product == "bytes" else torch.int32
        self.width = -(-spec.in_features * weight.bits // 32) * 4 // self.code_dtype.itemsize
        self._offset = 128 if self.product == "bytes" and weight.is_integer else 0
        self._choose, self._library = choose, library
        rounded_as = {"bytes": as_bytes, "int8": torch.int8}.get(self.product, torch.bfloat16)
        self._round = None if activation is None else Rounding(activation, rounded_as)
        self.rounding = None if weight.permuted else self._round  # norms and gates know nothing of an order

    def bind(self, buffer: Tensor) -> None:
        super().bind(buffer)
        if self._round is not None:
            self._round.input_scale = self._stored.get("input_scale")

    def pack(self, codes: Tensor) -> Tensor:
        return super().pack(codes ^ self._offset)

    def unpack(self, words: Tensor) -> Tensor:
        return super().unpack(words) ^ self._offset

    def __call__(self, x: Tensor | RoundedRows, out: Tensor | None = None) -> Tensor:
        rows, n = x.shape[0], self.spec.out_features
        if out is None:
            out = torch.empty((rows, n), dtype=torch.float32, device=x.device)
        if not rows:
            return out
        if isinstance(x, Tensor):
            if self.scheme.weight.permuted:
                x = x.index_select(1, self._stored["order"])
            x = RoundedRows(x, None) if self._round is None else self._round(x)
        choice = self._choose(rows) if self._choose is not None else self._usual(rows, out.device)
        return self._by_library(x, out) if choice.kernel == "library" else self._flat(x, out, choice)

    def _usual(self, rows: int, device: torch.device) -> Choice:
        if self._library and rows > MOST_ROWS:
            return LIBRARY
        splits = choose_splits(self.spec.out_features, self.spec.in_features, num_multiprocessors(device), self.tiles[0])
        return Choice("flat", 0, splits)

    def _flat(self, x: RoundedRows, out: Tensor, choice: Choice) -> Tensor:
        stored, tile, (n, c) = self._stored, self.tiles[choice.tile], (self.spec.out_features, self.spec.in_features)
        rows, bias = x.codes.shape[0], stored.get("bias")
        per_split = triton.cdiv(triton.cdiv(c, choice.splits), tile.k) * tile.k
        splits = triton.cdiv(c, per_split)
        parts = out if splits == 1 else torch.empty((splits, rows, n), dtype=torch.float32, device=out.device)
        block_t = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
        coded_kernel[(triton.cdiv(n, tile.n), splits, triton.cdiv(rows, block_t))](
            x.codes, x.codes.stride(0), x.codes if x.scales is None else x.scales, stored["codes"].view(self.code_dtype), stored["scale"],
            stored.get("zero", stored["scale"]), stored["scale"] if bias is None else bias, parts, parts.stride(-2), rows, n, c, self.width,
            self.num_scales, per_split, **self.constants, **x_constants(self._round, x), HAS_BIAS=bias is not None and splits == 1,
            SPLITS=splits, BLOCK_T=block_t, BLOCK_N=tile.n, BLOCK_K=tile.k, **tile.launch,
        )  # fmt: skip
        if splits > 1:
            block = min(1024, triton.next_power_of_2(n))
            add_splits_kernel[(rows, triton.cdiv(n, block))](
                parts, parts if bias is None else bias, out, out.stride(0), rows, n, HAS_BIAS=bias is not None, SPLITS=splits, BLOCK=block
            )
        return out

    def _by_library(self, x: RoundedRows, out: Tensor) -> Tensor:
        """torch._scaled_mm with scales of 1 and sums in float32: what it rounds to by scales of rows is bfloat16."""
        (rows, c), n, bias = x.codes.shape, self.spec.out_features, self._stored.get("bias")
        one = torch.ones((), dtype=torch.float32, device=out.device)
        weight = self._stored["codes"].view(self.code_dtype).view(n, c)
        sums = torch._scaled_mm(x.codes, weight.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
        block = min(1024, triton.next_power_of_2(n))
        scale_kernel[(rows, triton.cdiv(n, block))](
            sums, x.scales, self._stored["scale"], sums if bias is None else bias, out, out.stride(0), n,
            N_BLOCK=self.scheme.weight.block[0], HAS_BIAS=bias is not None, BLOCK=block,
        )  # fmt: skip
        return out


def x_constants(rounding: Rounding | None, x: RoundedRows) -> dict[str, int]:
    """What the kernels are compiled for, of an input."""
    if rounding is None or x.scales is None:
        return {"X_SCALES": 0, "X_GROUP": 0}
    return {"X_SCALES": x.scales.shape[1], "X_GROUP": rounding.fmt.block[1]}


def library_obstacle(spec: LinearSpec, units: Collection[str]) -> str:
    """Why torch._scaled_mm cannot multiply a linear; empty where it can."""
    scheme = Scheme.parse(spec.scheme)
    if product_of(scheme, units) != "bytes" or scheme.weight.is_integer:
        return "it takes float8 by float8, where matrix units do"
    if scheme.weight.scale not in ("tensor", "channel") or (scheme.activation is not None and scheme.activation.scale == "group"):
        return "it takes one scale for a row, not several inside a sum"
    if spec.in_features % LIBRARY_STEP or spec.out_features % LIBRARY_STEP:
        return f"it takes multiples of {LIBRARY_STEP}, not {spec.out_features} x {spec.in_features}"
    return ""


def _no_linear(spec: LinearSpec) -> Any:
    raise Unsupported(f"no linear in {spec.scheme} is needed here")


def method(scheme: str, units: Collection[str]) -> str:
    """How a linear of a scheme is computed, in words."""
    parsed = Scheme.parse(scheme)
    groups = [fmt.block[1] for fmt in (parsed.weight, parsed.activation) if fmt is not None and fmt.block[1] % STEP]
    if groups:
        return f"dequantized in registers, multiplied in float32: groups of {groups[0]} inputs do not fill {STEP}"
    product = product_of(parsed, units)
    if product == "bytes":
        return f"{parsed.weight.element} multiplied as it stands"
    if product == "float32":
        return "dequantized in registers, multiplied in float32"
    return f"codes widened in registers, multiplied in {product}"
