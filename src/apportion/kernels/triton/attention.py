"""Paged and latent attention on a GPU: the step's metadata in static device buffers, then the kernels of attention_kernels.

Requests with one row (decode) go to programs that share their context in splits, all others to tiles of rows; prompts that come whole go
to the library where `library_obstacle` is empty. Nothing reads the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.core.kv_spec import KVGroupSpec
from apportion.kernels.ops import AttentionSpec
from apportion.kernels.reference.number_formats import TORCH_DTYPES
from apportion.kernels.triton import attention_kernels as kernels
from apportion.kernels.triton.device import num_multiprocessors
from apportion.kernels.triton.float8 import FLOAT8, UNITS
from apportion.kernels.triton.tiles import Tile

PRODUCTS = {  # KV format -> what the matrix units multiply
    "float32": triton.language.float32, "bfloat16": triton.language.bfloat16, "float16": triton.language.float16,
    "fp8_e4m3": triton.language.bfloat16, "fp8_e5m2": triton.language.bfloat16,
}  # fmt: skip
SPLIT_LEN = 256  # tokens: a shorter part is not worth its sum
MAX_SPLITS = 32
STAGES = 3  # host buffers of metadata in turn: more than the steps that can be in flight


@dataclass(slots=True)
class Plan:
    """One step on the device, int32. starts [R+1], seq_lens [R], request_of [T] (-1: padding), table [R, W], decode [R, 2] and tiles
    [N, 2]: (request, first of its rows), -1 where there is nothing to do. num_decode: 0 or R. num_tokens: rows of the step. whole: rows
    [first, last) of each request that the library attends for."""

    starts: Tensor
    seq_lens: Tensor
    request_of: Tensor
    table: Tensor
    decode: Tensor
    tiles: Tensor
    num_decode: int
    num_tokens: int
    whole: list[tuple[int, int]]


class Metadata:
    """Device memory that every step's metadata is copied into, in one piece, at places that depend on its sizes alone: what a graph needs.

    generation: grows whenever the memory moved, so that graphs over it must be made again.
    """

    def __init__(self, device: torch.device) -> None:
        self.generation = 0
        self._device = device
        self._on_device = torch.empty(0, dtype=torch.int32, device=device)
        self._on_host: list[Tensor] = []
        self._turn = 0

    def upload(self, parts: list[np.ndarray]) -> list[Tensor]:
        """Copies of int32 arrays on the device, valid until the next call."""
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + -(-part.size // 4) * 4)
        if starts[-1] > len(self._on_device):
            size = 1 << (starts[-1] - 1).bit_length()
            self._on_device = torch.empty(size, dtype=torch.int32, device=self._device)
            pinned = self._device.type == "cuda"
            self._on_host = [torch.empty(size, dtype=torch.int32, pin_memory=pinned) for _ in range(STAGES)]
            self.generation += 1
        self._turn = (self._turn + 1) % STAGES
        host = self._on_host[self._turn]
        view = host.numpy()
        for part, start in zip(parts, starts[:-1], strict=True):
            view[start : start + part.size] = part.ravel()
        self._on_device[: starts[-1]].copy_(host[: starts[-1]], non_blocking=True)
        return [self._on_device[start : start + part.size].view(part.shape) for part, start in zip(parts, starts[:-1], strict=True)]


def plan_step(
    metadata: Metadata, tile_tokens: int, longest_whole: int, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor,
    num_requests: int, num_tokens: int,
) -> Plan:  # fmt: skip
    """tile_tokens: rows of one request that a program of the prefill kernel takes. longest_whole: of prompts for the library. The tensors
    lie on the host."""
    starts = query_start_loc[: num_requests + 1].numpy()
    counts = np.diff(starts)
    request_of = np.full(num_tokens, -1, np.int32)
    request_of[: starts[-1]] = np.repeat(np.arange(num_requests, dtype=np.int32), counts)
    decode = np.zeros((num_requests, 2), np.int32)
    decode[:, 0] = np.where(counts == 1, np.arange(num_requests), -1)
    lens = seq_lens[:num_requests].numpy()
    whole = (counts > 1) & (counts == lens) & (lens <= longest_whole)
    longer = np.flatnonzero((counts > 1) & ~whole).astype(np.int32)
    num_tiles = -(-counts[longer] // tile_tokens)
    tiles = np.zeros((int(num_tiles.sum()), 2), np.int32)
    tiles[:, 0] = np.repeat(longer, num_tiles)
    tiles[:, 1] = (np.arange(len(tiles)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * tile_tokens
    table = block_table[:num_requests].numpy()
    parts = [starts, lens, request_of, table, decode, tiles]
    num_decode = num_requests if (counts == 1).any() else 0
    rows = [(int(starts[i]), int(starts[i + 1])) for i in np.flatnonzero(whole)]
    return Plan(*metadata.upload(parts), num_decode=num_decode, num_tokens=num_tokens, whole=rows)


def choose_splits(programs: int, max_context: int, multiprocessors: int) -> int:
    """Parts of the context that give the chip about two programs a multiprocessor."""
    return max(1, min(MAX_SPLITS, triton.cdiv(2 * multiprocessors, programs), triton.cdiv(max_context, SPLIT_LEN)))


def _check(spec: AttentionSpec, arena: Tensor) -> None:
    kv = spec.kv
    if kv.format.name not in PRODUCTS:
        raise Unsupported(f"KV in {kv.format.name} has no Triton kernel; kv_cache_dtype can be {', '.join(PRODUCTS)}")
    if kv.head_dim > (1024 if kv.latent else 256) or kv.v_head_dim > (512 if kv.latent else 256):
        raise Unsupported(
            f"Triton attention takes heads of at most 256 channels (latents of 512), got {kv.head_dim} and {kv.v_head_dim}; take device=cpu"
        )
    if not kv.latent and (kv.head_dim % kv.format.lanes or kv.v_head_dim % kv.format.lanes):
        raise Unsupported(
            f"Triton attention over a cache in {kv.format.name} takes heads of a multiple of {kv.format.lanes} channels, got {kv.head_dim} "
            f"and {kv.v_head_dim}; take kv_cache_dtype=float32"
        )
    if spec.num_heads % kv.num_kv_heads:
        raise Unsupported(f"{spec.num_heads} query heads cannot share {kv.num_kv_heads} kv heads evenly")
    if spec.rotary_dim % 2 or spec.rotary_dim > kv.head_dim:
        raise Unsupported(f"rotary_dim must be even and at most head_dim ({kv.head_dim}), got {spec.rotary_dim}")
    if arena.dtype != torch.uint8 or not arena.is_contiguous() or arena.data_ptr() % 16:
        raise Unsupported("the KV arena must be contiguous uint8 and aligned to 16 bytes")


def library_obstacle(spec: AttentionSpec) -> str:
    """Why the library cannot attend for whole prompts as the paged kernel does; empty where it can."""
    kv = spec.kv
    if kv.format.lanes != 2:
        return f"over a cache in {kv.format.name} its numbers would be others; it takes bfloat16 and float16"
    if kv.head_dim != kv.v_head_dim or kv.head_dim % 8:
        return f"it takes keys and values of one width, a multiple of 8, not {kv.head_dim} and {kv.v_head_dim}"
    return ""


class _Planned:
    """What both kinds share: the arena seen as words and as numbers, and the metadata of a step."""

    def __init__(self, spec: AttentionSpec, arena: Tensor, decode_tile: Tile, prefill_tile: Tile) -> None:
        _check(spec, arena)
        self.spec = spec
        self.decode_tile, self.prefill_tile = decode_tile, prefill_tile
        self.metadata = Metadata(arena.device)
        self._group: KVGroupSpec = spec.kv
        self._per_kv_head = spec.num_heads // spec.kv.num_kv_heads
        name, lanes = spec.kv.format.name, spec.kv.format.lanes
        self._numbers = arena if lanes == 4 else arena.view(TORCH_DTYPES[name])
        self._words = arena.view(torch.float32 if lanes == 1 else torch.int32)
        element = name.removeprefix("fp8_")
        self._stored = {"LANES": lanes, "MANTISSA": FLOAT8[element][0] if lanes == 4 else 0, "BLOCK_SIZE": spec.kv.block_size}
        self._read = {**self._stored, "UNIT": UNITS.get(element, 1.0), "dtype": PRODUCTS[name]}
        self._scale = spec.scale * math.log2(math.e)
        self._multiprocessors = num_multiprocessors(arena.device)
        self._longest_whole = 0  # of prompts that the library attends for

    @property
    def generation(self) -> int:
        return self.metadata.generation

    def _heads(self, tile: Tile) -> int:
        """Query heads that a program takes: all that share a kv head, as far as they fit."""
        return min(self._per_kv_head, tile.rows)

    def _cut(self, tile: Tile) -> dict[str, int]:
        """Tokens of one lane are the inner side of a product, which takes at least 16."""
        tokens = max(tile.n, 16 * self._group.format.lanes)
        return {"HEADS": self._heads(tile), "BLOCK_M": tile.rows, "BLOCK_N": tokens, **tile.launch}

    def plan(
        self, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, num_requests: int, num_tokens: int, handle: Any = None
    ) -> Plan:
        """A plan of the same sizes as the last lies where that did, whether `handle` gives it or not: graphs need no more."""
        tile_tokens = self.prefill_tile.rows // self._heads(self.prefill_tile)
        step = query_start_loc, seq_lens, block_table, num_requests, num_tokens
        return plan_step(self.metadata, tile_tokens, self._longest_whole, *step)

    def _shape(self, plan: Plan, tile: Tile) -> tuple[int, int]:
        """(programs beside the items: kv heads times blocks of heads, splits of a decode step)"""
        blocks = self._group.num_kv_heads * triton.cdiv(self._per_kv_head, self._heads(tile))
        context = plan.table.shape[1] * self._group.block_size
        context = context if self._group.sliding_window is None else min(context, self._group.sliding_window)
        return blocks, choose_splits(max(1, plan.num_decode) * blocks, context, self._multiprocessors)

    def _parts(self, plan: Plan, splits: int) -> tuple[Tensor, Tensor]:
        shape = (plan.num_decode, self.spec.num_heads, splits)
        sums = torch.empty((*shape, self._group.v_head_dim), dtype=torch.float32, device=self._words.device)
        return sums, torch.empty((*shape, 2), dtype=torch.float32, device=self._words.device)

    def _combine(self, plan: Plan, parts: Tensor, marks: Tensor, out: Tensor, splits: int) -> None:
        kernels.combine_kernel[(plan.num_decode, self.spec.num_heads)](
            parts, marks, plan.decode, plan.starts, out, out.stride(0),
            HEADS=self.spec.num_heads, DV=self._group.v_head_dim, SPLITS=splits, BLOCK=triton.next_power_of_2(self._group.v_head_dim),
            num_warps=2,
        )  # fmt: skip


class PagedAttention(_Planned):
    """kernels/ops.PagedAttention. `unify` turns the softmax of a layer into that of FlashDecoding++. library: attends for whole prompts."""

    def __init__(self, spec: AttentionSpec, arena: Tensor, decode_tile: Tile, prefill_tile: Tile, library: bool = False) -> None:
        super().__init__(spec, arena, decode_tile, prefill_tile)
        kv = spec.kv
        self._longest_whole = (kv.sliding_window or 1 << 30) if library else 0
        self._phi: dict[int, Tensor] = {}
        self.recomputed = torch.zeros(1, dtype=torch.int32, device=arena.device)
        padded = triton.next_power_of_2
        self._shapes: dict[str, Any] = {
            **self._read, "D": kv.head_dim, "DV": kv.v_head_dim, "K_HEADS": kv.num_kv_heads, "GROUP": self._per_kv_head,
            "WINDOW": kv.sliding_window or 0, "ROWS": max(16, padded(-(-kv.head_dim // kv.format.lanes))),
            "COLUMNS": max(16, padded(kv.v_head_dim)),
        }  # fmt: skip

    def unify(self, layer_offset: int, phi_H: Tensor | None) -> None:
        """kernels/ops.PagedAttention.unify, for what the library does not attend for. A head without a phi keeps its layer online: it would
        walk twice."""
        if phi_H is None or (not phi_H.is_meta and phi_H.isnan().any()):
            self._phi.pop(layer_offset, None)
        else:
            self._phi[layer_offset] = phi_H.to(device=self._words.device, dtype=torch.float32).contiguous()

    def write(
        self,
        layer_offset: int,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        handle: Plan,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        kv, plan, half, padded = self._group, handle, self.spec.rotary_dim // 2, triton.next_power_of_2
        normalized = self.spec.qk_norm_eps is not None and q_norm is not None and k_norm is not None
        if not plan.num_tokens:
            return
        kernels.write_kernel[(plan.num_tokens, self.spec.num_heads + 2 * kv.num_kv_heads)](
            qkv, qkv.stride(0), cos_sin, self._numbers, layer_offset, cos_sin if scales is None else scales, plan.request_of, plan.starts,
            plan.seq_lens, plan.table, plan.table.stride(0), q_norm if normalized else cos_sin, k_norm if normalized else cos_sin,
            self.spec.qk_norm_eps or 0.0,
            Q_HEADS=self.spec.num_heads, K_HEADS=kv.num_kv_heads, D=kv.head_dim, DV=kv.v_head_dim, HALF=half,
            INTERLEAVED=self.spec.interleaved, NORM=normalized, BACK=bool(plan.whole), SCALED=scales is not None, **self._stored,
            BLOCK=padded(max(1, half)), REST=padded(max(kv.v_head_dim, kv.head_dim - 2 * half)), num_warps=1,
        )  # fmt: skip

    def run(self, layer_offset: int, qkv: Tensor, out: Tensor, handle: Plan, scales: Tensor | None = None) -> Tensor:
        plan = handle
        if plan.num_decode:
            self._decode(layer_offset, qkv, out, plan, scales)
        if len(plan.tiles):
            grid, phi = (len(plan.tiles), self._shape(plan, self.prefill_tile)[0], 1), self._phi.get(layer_offset)
            kernels.paged_kernel[grid](
                *self._inputs(layer_offset, qkv, plan, plan.tiles, scales, out if phi is None else phi), out, out.stride(0), out,
                self.recomputed, **self._shapes, **self._cut(self.prefill_tile), SCALED=scales is not None, PARTIAL=False, SPLITS=1,
                UNIFIED=phi is not None,
            )  # fmt: skip
        for first, last in plan.whole:
            self._by_library(qkv[first:last], out[first:last])
        return out

    def _by_library(self, qkv: Tensor, out: Tensor) -> None:
        """Causal attention of one prompt among its own rows, whose keys `write` has left rotated. Rounded as the cache rounds."""
        heads, kv = self.spec.num_heads, self._group
        rows = qkv.to(TORCH_DTYPES[kv.format.name]).unflatten(-1, (-1, kv.head_dim)).transpose(0, 1)[None]
        q, k, v = rows.split((heads, kv.num_kv_heads, kv.num_kv_heads), dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.spec.scale, enable_gqa=True)
        out.unflatten(-1, (heads, -1)).copy_(attended[0].transpose(0, 1))

    def _decode(self, layer_offset: int, qkv: Tensor, out: Tensor, plan: Plan, scales: Tensor | None) -> None:
        blocks, splits = self._shape(plan, self.decode_tile)
        parts, marks = self._parts(plan, splits)
        phi, cut = self._phi.get(layer_offset), {**self._cut(self.decode_tile), "SCALED": scales is not None}
        kernels.paged_kernel[(plan.num_decode, blocks, splits)](
            *self._inputs(layer_offset, qkv, plan, plan.decode, scales, marks if phi is None else phi), parts, 0, marks,
            self.recomputed, **self._shapes, **cut, PARTIAL=True, SPLITS=splits, UNIFIED=phi is not None,
        )  # fmt: skip
        if phi is None:
            self._combine(plan, parts, marks, out, splits)
            return
        kernels.unified_combine_kernel[(plan.num_decode, blocks)](
            parts, marks, qkv, qkv.stride(0), self._words, layer_offset // 4, marks if scales is None else scales, plan.decode, plan.starts,
            plan.seq_lens, plan.table, plan.table.stride(0), self._scale, out, out.stride(0), self.recomputed, **self._shapes, **cut,
            SPLITS=splits,
        )  # fmt: skip

    def _inputs(self, layer_offset: int, qkv: Tensor, plan: Plan, items: Tensor, scales: Tensor | None, phi: Tensor) -> tuple[Any, ...]:
        return (
            qkv, qkv.stride(0), self._words, layer_offset // 4, phi if scales is None else scales, items, plan.starts, plan.seq_lens,
            plan.table, plan.table.stride(0), phi, self._scale,
        )  # fmt: skip


class LatentAttention(_Planned):
    """kernels/ops.LatentAttention."""

    recomputed = 0

    def unify(self, layer_offset: int, phi_H: Tensor | None) -> None:
        if phi_H is not None:
            raise Unsupported("latent attention has no unified softmax on a GPU; leave out softmax_table, its softmax is then online")

    def write(self, layer_offset: int, latent: Tensor, handle: Plan, scales: Tensor | None = None) -> None:
        kv, plan = self._group, handle
        if plan.num_tokens:
            kernels.write_latent_kernel[(plan.num_tokens,)](
                latent, latent.stride(0), self._numbers, layer_offset, latent if scales is None else scales, plan.request_of, plan.starts,
                plan.seq_lens, plan.table, plan.table.stride(0), D=kv.head_dim, SCALED=scales is not None, **self._stored,
                BLOCK=triton.next_power_of_2(kv.head_dim), num_warps=2,
            )  # fmt: skip

    def _heads(self, tile: Tile) -> int:
        return min(self._per_kv_head, 16)

    def run(self, layer_offset: int, q: Tensor, out: Tensor, handle: Plan, scales: Tensor | None = None) -> Tensor:
        plan = handle
        flat_out = out.flatten(1)
        if plan.num_decode:
            _, splits = self._shape(plan, self.decode_tile)
            parts, marks = self._parts(plan, splits)
            self._launch(layer_offset, q, plan, plan.decode, self.decode_tile, (parts, 0, marks), splits, scales)
            self._combine(plan, parts, marks, flat_out, splits)
        if len(plan.tiles):
            self._launch(layer_offset, q, plan, plan.tiles, self.prefill_tile, (flat_out, flat_out.stride(0), flat_out), 0, scales)
        return out

    def _launch(
        self, layer_offset: int, q: Tensor, plan: Plan, items: Tensor, tile: Tile, outputs: tuple[Tensor, int, Tensor], splits: int,
        scales: Tensor | None,
    ) -> None:  # fmt: skip
        """splits 0: no parts, straight into out."""
        kv, columns = self._group, max(16, triton.next_power_of_2(self._group.v_head_dim))
        kernels.latent_kernel[(len(items), self._shape(plan, tile)[0], max(1, splits))](
            q, q.stride(0), q.stride(1), self._words, layer_offset // 4, q if scales is None else scales, items, plan.starts, plan.seq_lens,
            plan.table, plan.table.stride(0), self._scale, *outputs, D=kv.head_dim, DV=kv.v_head_dim, GROUP=self._per_kv_head,
            COLUMNS=columns, CHUNK=min(128, columns),
            ROPE=max(16, triton.next_power_of_2(kv.head_dim - kv.v_head_dim)), SCALED=scales is not None, PARTIAL=splits > 0,
            SPLITS=max(1, splits), **self._read, **self._cut(tile),
        )  # fmt: skip
