"""A grouped GEMM over experts without a host sync: tokens are sorted by expert on the device, tiles of one expert each are multiplied.

`align` deals (token, choice) pairs into tiles of BLOCK_T slots that belong to one expert; the number of tiles has a bound that depends on
shapes alone, so the grid is known before routing is (and a graph can hold it). Unused tiles end at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.kernels.ops import ExpertsSpec, QuantizedWeight
from apportion.kernels.reference.number_formats import TORCH_DTYPES
from apportion.kernels.triton.linear import plain_sums
from apportion.kernels.triton.tiles import Tile

CHUNK = 64  # pairs that the alignment looks at together


@triton.jit
def align_kernel(
    ids, num_pairs, slots, tile_expert, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr
):
    """ids int32 [P] -> slots int32 [tiles * BLOCK_T]: a pair or -1; tile_expert int32 [tiles]: an expert or -1 (both preset to -1)."""
    experts, lanes = tl.arange(0, BLOCK_E), tl.arange(0, CHUNK)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        expert = tl.load(ids + start + lanes, mask=start + lanes < num_pairs, other=-1)
        counts += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tiles = (counts + BLOCK_T - 1) // BLOCK_T
    ends = tl.cumsum(tiles, axis=0)
    first_tile = ends - tiles
    most = tl.max(tiles, axis=0)
    for i in range(most):
        tl.store(tile_expert + first_tile + i, experts, mask=i < tiles)
    filled = first_tile * BLOCK_T  # the next free slot of each expert
    for start in range(0, num_pairs, CHUNK):
        expert = tl.load(ids + start + lanes, mask=start + lanes < num_pairs, other=-1)
        mine = (expert[:, None] == experts[None, :]).to(tl.int32)
        rank = tl.cumsum(mine, axis=0) - 1
        slot = tl.sum(tl.where(mine > 0, rank + filled[None, :], 0), axis=1)
        tl.store(slots + slot, start + lanes, mask=(expert >= 0) & (expert < EXPERTS))
        filled += tl.sum(mine, axis=0)


@triton.jit
def gate_up_kernel(
    x, x_stride, weight, slots, tile_expert, hidden_out, top_k, c, f,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden_out [slots, F] = silu(x gate^T) * (x up^T) of each slot's token; weight [E, 2F, C], gates first."""
    tile, block = tl.program_id(1), tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        lanes, inner = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
        pair = tl.load(slots + tile * BLOCK_T + lanes)
        token = (pair // top_k).to(tl.int64)
        outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = outputs < f
        gate_place = weight + (expert.to(tl.int64) * 2 * f + outputs)[:, None] * c + inner[None, :]
        up_place = weight + ((expert.to(tl.int64) * 2 + 1) * f + outputs)[:, None] * c + inner[None, :]
        x_place = x + token[None, :] * x_stride + inner[:, None]
        gate, up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32), tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for k in range(0, c, BLOCK_K):
            inside_k = k + inner < c
            seen = tl.load(x_place + k, mask=inside_k[:, None] & (pair >= 0)[None, :], other=0.0).to(weight.dtype.element_ty)
            mask = inside[:, None] & inside_k[None, :]
            gate = tl.dot(tl.load(gate_place + k, mask=mask, other=0.0), seen, gate, input_precision="ieee")
            up = tl.dot(tl.load(up_place + k, mask=mask, other=0.0), seen, up, input_precision="ieee")
        gated = gate * tl.sigmoid(gate) * up
        place = hidden_out + (tile * BLOCK_T + lanes).to(tl.int64)[None, :] * f + outputs[:, None]
        tl.store(place, gated.to(hidden_out.dtype.element_ty), mask=inside[:, None] & (pair >= 0)[None, :])


@triton.jit
def down_kernel(hidden, weight, slots, tile_expert, parts, c, n, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """parts [pairs, N] = hidden [slots, C] times weight [E, N, C]^T, each row at its pair."""
    tile, block = tl.program_id(1), tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert >= 0:
        slot = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        pair = tl.load(slots + slot)
        outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside, own = outputs < n, weight + expert.to(tl.int64) * n * c
        sums = plain_sums(hidden, c, slot, pair >= 0, own, c, outputs, inside, 0, c, BLOCK_T, BLOCK_N, BLOCK_K)
        place = parts + pair.to(tl.int64)[None, :] * n + outputs[:, None]
        tl.store(place, sums, mask=inside[:, None] & (pair >= 0)[None, :])


@triton.jit
def weigh_kernel(parts, ids, weights, out, n, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, N] = sum over k, in order, of weights[t, k] * parts[t, k]; an id below 0 is skipped."""
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < n
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        chosen = tl.load(ids + pair) >= 0
        total += tl.load(parts + pair * n + outputs, mask=inside & chosen, other=0.0) * tl.load(weights + pair)
    tl.store(out + token * n + outputs, total.to(out.dtype.element_ty), mask=inside)


def tile_bound(num_pairs: int, num_experts: int, block_t: int) -> int:
    """Tiles that can be needed: an expert has at most one that is not full."""
    return min(num_pairs, num_pairs // block_t + num_experts)


@dataclass(slots=True)
class Dealt:
    """The (token, choice) pairs of a step in `num_tiles` tiles of one expert each: what `align_kernel` makes."""

    slots: Tensor
    tile_expert: Tensor
    num_tiles: int
    block_t: int
    top_k: int


def deal(expert_ids: Tensor, num_experts: int) -> Dealt:
    """expert_ids int32 [T, k], T * k above 0. Nothing is read back."""
    pairs = expert_ids.numel()
    block_t = 16 if pairs <= 16 * num_experts else 64
    tiles = tile_bound(pairs, num_experts, block_t)
    table = torch.full((tiles * (block_t + 1),), -1, dtype=torch.int32, device=expert_ids.device)
    dealt = Dealt(table[: tiles * block_t], table[tiles * block_t :], tiles, block_t, expert_ids.shape[1])
    align_kernel[(1,)](
        expert_ids, pairs, dealt.slots, dealt.tile_expert,
        EXPERTS=num_experts, BLOCK_T=block_t, BLOCK_E=triton.next_power_of_2(num_experts), CHUNK=CHUNK,
    )  # fmt: skip
    return dealt


def weigh(parts: Tensor, expert_ids: Tensor, expert_weights: Tensor, out: Tensor) -> Tensor:
    """Sum of parts [T * k, M], each times its weight, over the k of a token: out [T, M]."""
    (rows, top_k), m = expert_ids.shape, out.shape[1]
    block = min(1024, triton.next_power_of_2(m))
    weigh_kernel[(rows, triton.cdiv(m, block))](parts, expert_ids, expert_weights, out, m, TOP_K=top_k, BLOCK=block)
    return out


class GroupedExperts:
    """kernels/ops.Experts, all of one floating-point dtype. Buffer: gate and up [E, 2F, M], then (256-byte aligned) down [E, M, F]."""

    def __init__(self, spec: ExpertsSpec, tile: Tile) -> None:
        found = {scheme for schemes in spec.schemes for scheme in schemes}
        if len(found) > 1 or not found <= set(TORCH_DTYPES):
            raise Unsupported(
                f"experts of {', '.join(sorted(found))} have no grouped Triton kernel; experts of one floating-point dtype have"
            )
        self.spec = spec
        self.tile = tile
        self._dtype = TORCH_DTYPES[found.pop()]
        self._numbers = spec.num_experts * spec.ffn * spec.hidden
        self._down_start = -(-2 * self._numbers * self._dtype.itemsize // 256) * 256
        self.nbytes = self._down_start + self._numbers * self._dtype.itemsize

    def bind(self, buffer: Tensor) -> None:
        e, f, m, width = self.spec.num_experts, self.spec.ffn, self.spec.hidden, self._dtype.itemsize
        self._gate_up = buffer[: 2 * self._numbers * width].view(self._dtype).view(e, 2 * f, m)
        self._down = buffer[self._down_start : self._down_start + self._numbers * width].view(self._dtype).view(e, m, f)

    def load(self, expert: int, projection: str, weight: Tensor | QuantizedWeight, row: int = 0) -> None:
        if isinstance(weight, QuantizedWeight):
            raise Unsupported(f"experts in {weight.format.name} have no Triton kernel yet")
        whole = self._down[expert] if projection == "down" else self._gate_up[expert]
        first = row + (self.spec.ffn if projection == "up" else 0)
        whole[first : first + len(weight)].copy_(weight)

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        tile, (e, f, m) = self.tile, (self.spec.num_experts, self.spec.ffn, self.spec.hidden)
        out = torch.empty((len(x), m), dtype=x.dtype, device=x.device)
        if not expert_ids.numel():
            return out
        dealt = deal(expert_ids, e)
        hidden = torch.empty((len(dealt.slots), f), dtype=self._dtype, device=x.device)
        parts = torch.empty((expert_ids.numel(), m), dtype=torch.float32, device=x.device)
        sizes: dict[str, Any] = {"BLOCK_T": dealt.block_t, "BLOCK_N": tile.n, "BLOCK_K": tile.k, **tile.launch}
        gate_up_kernel[(triton.cdiv(f, tile.n), dealt.num_tiles)](
            x, x.stride(0), self._gate_up, dealt.slots, dealt.tile_expert, hidden, dealt.top_k, m, f, **sizes
        )
        down_kernel[(triton.cdiv(m, tile.n), dealt.num_tiles)](hidden, self._down, dealt.slots, dealt.tile_expert, parts, f, m, **sizes)
        return weigh(parts, expert_ids, expert_weights, out)
