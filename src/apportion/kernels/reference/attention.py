"""Paged and latent attention by gathering each request's context into dense tensors: the oracle of the attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.core.kv_spec import KVGroupSpec
from apportion.kernels.ops import AttentionSpec
from apportion.kernels.reference.elementwise import rms_norm, rotate
from apportion.kernels.reference.formats import read_blocks, write_tokens

_SCORES = 1 << 24  # scores held at once, in elements: queries are walked in pieces of this size


@dataclass(slots=True)
class Plan:
    """One step as the reference sees it.

    rows: per request, the rows [first, last) of its tokens. seq_lens: context lengths, this step included. entries, slots: where each
    of the T new tokens is stored.
    """

    rows: list[tuple[int, int]]
    seq_lens: list[int]
    block_table: Tensor
    entries: Tensor
    slots: Tensor


def plan_step(group: KVGroupSpec, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, num_requests: int) -> Plan:
    starts = query_start_loc[: num_requests + 1].long()
    lens = seq_lens[:num_requests].long()
    counts = starts.diff()
    request = torch.repeat_interleave(torch.arange(num_requests), counts)
    position = torch.arange(len(request)) - (starts[1:] - lens)[request]
    bounds = starts.tolist()
    return Plan(
        rows=list(zip(bounds[:-1], bounds[1:], strict=True)),
        seq_lens=lens.tolist(),
        block_table=block_table,
        entries=block_table[request, position // group.block_size],
        slots=position % group.block_size,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, first_position: int, k_position: int, scale: float, window: int | None) -> Tensor:
    """q [n, H, D] at positions first_position.. over k [S, K, D], v [S, K, Dv] at positions k_position.. -> [n, H, Dv]."""
    n, heads, _ = q.shape
    context, kv_heads, _ = k.shape
    keys, values = k.permute(1, 2, 0), v.permute(1, 0, 2)  # [K, D, S], [K, S, Dv]
    queries = q.view(n, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)  # [K, G, n, D]
    k_positions = torch.arange(k_position, k_position + context)
    out = q.new_empty(n, heads, v.shape[-1])
    step = max(1, _SCORES // (heads * context))
    for start in range(0, n, step):
        piece = queries[:, :, start : start + step]
        q_positions = torch.arange(first_position + start, first_position + start + piece.shape[2])
        hidden = k_positions > q_positions[:, None]
        if window is not None:
            hidden |= k_positions <= q_positions[:, None] - window
        scores = (piece.flatten(1, 2) @ keys).mul_(scale).unflatten(1, piece.shape[1:3]).masked_fill_(hidden, -torch.inf)
        mixed = (scores.softmax(dim=-1).flatten(1, 2) @ values).unflatten(1, piece.shape[1:3])  # [K, G, piece, Dv]
        out[start : start + step] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def attend_paged(arena: Tensor, spec: AttentionSpec, layer_offset: int, q: Tensor, out: Tensor, plan: Plan, scales: Tensor | None) -> None:
    """Causal attention of q [T, H, D] over each request's blocks into out [T, H, Dv]."""
    size, window = spec.kv.block_size, spec.kv.sliding_window
    for request, ((first, last), seq_len) in enumerate(zip(plan.rows, plan.seq_lens, strict=True)):
        if first == last:
            continue
        position = seq_len - (last - first)
        seen = 0 if window is None else max(0, position - window + 1) // size  # blocks before it are dead
        entries = plan.block_table[request, seen : -(-seq_len // size)]
        k, v = read_blocks(arena, spec.kv, layer_offset, entries, scales)
        length = seq_len - seen * size
        out[first:last] = attend(q[first:last], k[:length], v[:length], position, seen * size, spec.scale, window)


class ReferencePagedAttention:
    """kernels/ops.PagedAttention."""

    generation = 0
    recomputed = 0

    def __init__(self, spec: AttentionSpec, arena: Tensor) -> None:
        self.spec = spec
        self._arena = arena

    def plan(
        self, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, num_requests: int, num_tokens: int, handle: Any = None
    ) -> Plan:
        return plan_step(self.spec.kv, query_start_loc, seq_lens, block_table, num_requests)

    def unify(self, layer_offset: int, phi_H: Tensor | None) -> None:
        """Nothing changes: any number subtracted from a row's scores leaves its softmax as it is."""

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
        q, k, v = self._split(qkv, handle)
        k = k.clone()
        for x, weight in ((q, q_norm), (k, k_norm)):
            if weight is not None and self.spec.qk_norm_eps is not None:
                x.copy_(rms_norm(x, weight, self.spec.qk_norm_eps))
            if self.spec.rotary_dim:
                rotate(x[..., : self.spec.rotary_dim], positions[: len(x)], cos_sin, self.spec.interleaved)
        write_tokens(self._arena, self.spec.kv, layer_offset, handle.entries, handle.slots, k, v, scales)

    def run(self, layer_offset: int, qkv: Tensor, out: Tensor, handle: Plan, scales: Tensor | None = None) -> Tensor:
        q, _, _ = self._split(qkv, handle)
        attend_paged(self._arena, self.spec, layer_offset, q, out.unflatten(-1, (self.spec.num_heads, -1)), handle, scales)
        return out

    def _split(self, qkv: Tensor, handle: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """Views q [T, H, D], k [T, K, D], v [T, K, Dv] of the rows that the step holds."""
        kv = self.spec.kv
        widths = [self.spec.num_heads * kv.head_dim, kv.num_kv_heads * kv.head_dim, kv.num_kv_heads * kv.v_head_dim]
        q, k, v = qkv[: len(handle.entries)].split(widths, dim=-1)
        return q.unflatten(-1, (-1, kv.head_dim)), k.unflatten(-1, (-1, kv.head_dim)), v.unflatten(-1, (-1, kv.v_head_dim))


class ReferenceLatentAttention:
    """kernels/ops.LatentAttention."""

    generation = 0
    recomputed = 0

    def __init__(self, spec: AttentionSpec, arena: Tensor) -> None:
        self.spec = spec
        self._arena = arena

    def plan(
        self, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, num_requests: int, num_tokens: int, handle: Any = None
    ) -> Plan:
        return plan_step(self.spec.kv, query_start_loc, seq_lens, block_table, num_requests)

    def unify(self, layer_offset: int, phi_H: Tensor | None) -> None:
        """Nothing changes: any number subtracted from a row's scores leaves its softmax as it is."""

    def write(self, layer_offset: int, latent: Tensor, handle: Plan, scales: Tensor | None = None) -> None:
        latent = latent[: len(handle.entries), None]
        write_tokens(self._arena, self.spec.kv, layer_offset, handle.entries, handle.slots, latent, None, scales)

    def run(self, layer_offset: int, q: Tensor, out: Tensor, handle: Plan, scales: Tensor | None = None) -> Tensor:
        attend_paged(self._arena, self.spec, layer_offset, q, out, handle, scales)
        return out
