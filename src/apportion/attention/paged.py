"""Attention over the paged KV cache: every query token of a step, prefill and decode alike, against its request's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from apportion.attention.backend import AttentionMetadata
from apportion.kernels.ops import AttentionSpec, Ops


class PagedBackend:
    """One layer group over one KV arena (uint8 [bytes]). cos_sin: the rotary table, float32 [positions, rotary_dim].

    scales: float32 [2, K] of each layer, where the format is scaled.
    """

    def __init__(self, ops: Ops, spec: AttentionSpec, arena: Tensor, cos_sin: Tensor, scales: Mapping[int, Tensor] | None = None) -> None:
        self.spec = spec
        self._kernel = ops.paged_attention(spec, arena)
        self._cos_sin = cos_sin
        self._scales = scales or {}
        self._unified = False
        self._offsets = {layer: spec.kv.layer_offset(layer) for layer in spec.kv.layers}

    @property
    def generation(self) -> int:
        return self._kernel.generation

    @property
    def recomputed(self) -> Any:
        return self._kernel.recomputed if self._unified else 0

    def unify(self, layer: int, phi_H: Tensor) -> None:
        self._kernel.unify(self._offsets[layer], phi_H)
        self._unified = True

    def plan(self, metadata: AttentionMetadata) -> AttentionMetadata:
        m = metadata
        m.handle = self._kernel.plan(m.query_start_loc, m.seq_lens, m.block_table, m.num_requests, m.num_tokens, m.handle)
        return m

    def run(
        self,
        layer: int,
        qkv_TC: Tensor,
        positions_T: Tensor,
        out_TC: Tensor,
        metadata: AttentionMetadata,
        q_norm_D: Tensor | None = None,
        k_norm_D: Tensor | None = None,
    ) -> Tensor:
        offset, handle, scales = self._offsets[layer], metadata.handle, self._scales.get(layer)
        self._kernel.write(offset, qkv_TC, positions_T, self._cos_sin, handle, q_norm_D, k_norm_D, scales)
        return self._kernel.run(offset, qkv_TC, out_TC, handle, scales)
