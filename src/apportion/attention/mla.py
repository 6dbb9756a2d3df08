"""Multi-head latent attention over a latent cache (DeepSeek-V2, arXiv:2405.04434, section 2.1), in absorbed form for every token.

One vector per token is stored: the normalized latent and the rotated shared key. Queries come multiplied into the latent space, so all
heads attend over the same rows, prefill and decode alike, and values are the latents themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from apportion.attention.backend import AttentionMetadata
from apportion.kernels.ops import AttentionSpec, Ops


class LatentBackend:
    """One latent layer group over one KV arena (uint8 [bytes]). cos_sin: the rotary table, float32 [positions, rotary_dim].

    `qkv_TC` holds H absorbed queries and then the token's own latent, each of `head_dim` channels, the last rotary_dim not yet rotated.
    scales: float32 [2, 1] of each layer, where the format is scaled.
    """

    def __init__(self, ops: Ops, spec: AttentionSpec, arena: Tensor, cos_sin: Tensor, scales: Mapping[int, Tensor] | None = None) -> None:
        self.spec = spec
        self._kernel = ops.latent_attention(spec, arena)
        self._rotate = ops.rotate
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

    def run(self, layer: int, qkv_TC: Tensor, positions_T: Tensor, out_TC: Tensor, metadata: AttentionMetadata) -> Tensor:
        """out_TC: [T, H * v_head_dim], still in the latent space."""
        offset, handle, heads, scales = self._offsets[layer], metadata.handle, self.spec.num_heads, self._scales.get(layer)
        joint_THD = qkv_TC.unflatten(-1, (heads + 1, self.spec.kv.head_dim))
        self._rotate(joint_THD[..., -self.spec.rotary_dim :], positions_T, self._cos_sin, self.spec.interleaved)
        self._kernel.write(offset, joint_THD[:, heads], handle, scales)
        self._kernel.run(offset, joint_THD[:, :heads], out_TC.unflatten(-1, (heads, -1)), handle, scales)
        return out_TC
