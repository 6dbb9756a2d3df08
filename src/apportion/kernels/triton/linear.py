"""Linears in floating point: the flat GEMM of FlashDecoding++ (arXiv:2311.01282, section 4) for few tokens, the library for many.

A flat GEMM is bound by the weight's bytes. So the weight stands on the matrix unit's large side: a program owns BLOCK_N outputs for all
tokens (padded to 16 at most 64) and walks C in tiles that are fetched ahead (`num_stages`, the paper's double buffering, deeper). Where N
gives too few programs for the chip, C is cut into `splits` parts whose float32 sums a second kernel adds in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.kernels.interval_table import Choice
from apportion.kernels.ops import LinearSpec, QuantizedWeight
from apportion.kernels.reference.linear import ReferenceLinear
from apportion.kernels.triton.device import num_multiprocessors
from apportion.kernels.triton.elementwise import silu_mul
from apportion.kernels.triton.tiles import MOST_ROWS, Tile

SPLITS = (1, 2, 4, 8)
SHORTEST = 512


@triton.jit
def plain_sums(
    x, x_stride, x_rows, inside_t, weight, c, outputs, inside_n, first, last,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums [BLOCK_N, BLOCK_T] of weight [N, C] times rows of x, rounded to the weight's dtype, over inputs [first, last)."""
    inner = tl.arange(0, BLOCK_K)
    w_place = weight + outputs.to(tl.int64)[:, None] * c + inner[None, :]
    x_place = x + x_rows[None, :] * x_stride + inner[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for k in range(first, last, BLOCK_K):
        inside_k = k + inner < last
        w = tl.load(w_place + k, mask=inside_n[:, None] & inside_k[None, :], other=0.0)
        seen = tl.load(x_place + k, mask=inside_k[:, None] & inside_t[None, :], other=0.0).to(weight.dtype.element_ty)
        sums = tl.dot(w, seen, sums, input_precision="ieee")
    return sums


@triton.jit
def flat_kernel(
    x, x_stride, weight, bias, out, out_stride, rows, n, c, c_per_split,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, C] @ weight [N, C]^T (+ bias); with several splits, out is float32 [SPLITS, T, N] and gets no bias."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    tokens = (tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside_n, inside_t = outputs < n, tokens < rows
    first = split * c_per_split
    last = tl.minimum(first + c_per_split, c)
    sums = plain_sums(x, x_stride, tokens, inside_t, weight, c, outputs, inside_n, first, last, BLOCK_T, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        sums += tl.load(bias + outputs, mask=inside_n, other=0.0)[:, None]
    row = (split * rows if SPLITS > 1 else 0) + tokens
    place = out + row[None, :] * out_stride + outputs[:, None]
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside_n[:, None] & inside_t[None, :])


@triton.jit
def add_splits_kernel(parts, bias, out, out_stride, rows, n, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < n
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + token) * n + outputs, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=inside, other=0.0)
    tl.store(out + token * out_stride + outputs, total.to(out.dtype.element_ty), mask=inside)


def flat(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, splits: int, tile: Tile) -> Tensor:
    """x [T, C] (rows may be strided) times weight [N, C] -> out [T, N], sums in float32; x is rounded to the weight's dtype."""
    (rows, c), n = x.shape, weight.shape[0]
    block_t = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    per_split = triton.cdiv(triton.cdiv(c, splits), tile.k) * tile.k
    splits = triton.cdiv(c, per_split)
    parts = out if splits == 1 else torch.empty((splits, rows, n), dtype=torch.float32, device=x.device)
    has_bias = bias is not None
    flat_kernel[(triton.cdiv(n, tile.n), splits, triton.cdiv(rows, block_t))](
        x, x.stride(0), weight, bias if has_bias else weight, parts, parts.stride(-2), rows, n, c, per_split,
        HAS_BIAS=has_bias and splits == 1, SPLITS=splits, BLOCK_T=block_t, BLOCK_N=tile.n, BLOCK_K=tile.k, **tile.launch,
    )  # fmt: skip
    if splits > 1:
        block = min(1024, triton.next_power_of_2(n))
        add_splits_kernel[(rows, triton.cdiv(n, block))](
            parts, bias if has_bias else parts, out, out.stride(0), rows, n, HAS_BIAS=has_bias, SPLITS=splits, BLOCK=block
        )
    return out


def choose_splits(n: int, c: int, multiprocessors: int, tile: Tile) -> int:
    """Parts of C that bring the programs near two to a multiprocessor, none shorter than four tiles and SHORTEST inputs."""
    programs, least = triton.cdiv(n, tile.n), max(4 * tile.k, SHORTEST)
    return max(s for s in SPLITS if s == 1 or (programs * s <= 2 * multiprocessors and c >= s * least))


class TritonLinear(ReferenceLinear):
    """kernels/ops.Linear: rows as they are in a checkpoint, then the bias.

    choose: tokens -> what multiplies; None: the flat kernel always, with the first tile and as many splits as fill the chip.
    """

    def __init__(self, spec: LinearSpec, tiles: Sequence[Tile], choose: Callable[[int], Choice] | None) -> None:
        super().__init__(spec)
        self._tiles, self._choose = tiles, choose

    def load_rows(self, weight: Tensor | QuantizedWeight, row: int) -> None:
        if isinstance(weight, QuantizedWeight):
            raise Unsupported(f"weights in {weight.format.name} have no Triton kernel yet")
        super().load_rows(weight, row)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.spec.gated:
            both = torch.empty((x.shape[0], self.spec.out_features), dtype=x.dtype, device=x.device)
            return silu_mul(self._product(x, both), out)
        if out is None:
            out = torch.empty((x.shape[0], self.spec.out_features), dtype=x.dtype, device=x.device)
        return self._product(x, out)

    def _product(self, x: Tensor, out: Tensor) -> Tensor:
        if not x.shape[0]:
            return out
        choice = self._choose(x.shape[0]) if self._choose is not None else self._filling(x.device)
        if choice.kernel == "library":
            return self._by_library(x, out)
        return flat(x, self._weight, self._bias, out, choice.splits, self._tiles[choice.tile])

    def _filling(self, device: torch.device) -> Choice:
        return Choice("flat", 0, choose_splits(self.spec.out_features, self.spec.in_features, num_multiprocessors(device), self._tiles[0]))

    def rows(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        found = self._weight.index_select(0, ids).float()
        return found if out is None else out.copy_(found)

    def _by_library(self, x: Tensor, out: Tensor) -> Tensor:
        """Sums in float32, and not rounded where the output is float32."""
        seen = x.to(self._dtype)
        if out.dtype == self._dtype:
            y = F.linear(seen, self._weight)
        else:
            y = torch.mm(seen, self._weight.T, out_dtype=out.dtype)
        return out.copy_(y) if self._bias is None else out.copy_(y.add_(self._bias))
