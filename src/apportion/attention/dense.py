"""Attention without a cache: whole sequences in, nothing kept. For calibration, and as a check on the paged path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.attention.backend import AttentionMetadata
from apportion.core.errors import InternalError
from apportion.kernels.ops import AttentionSpec, Ops


class DenseBackend:
    """Every request of a batch brings all its tokens: seq_lens equals its rows. block_table is not read."""

    def __init__(self, ops: Ops, spec: AttentionSpec, cos_sin: Tensor) -> None:
        self.spec = spec
        self._ops = ops
        self._cos_sin = cos_sin

    generation = recomputed = 0

    def unify(self, layer: int, phi_H: Tensor) -> None:
        raise InternalError("dense attention computes the library's softmax")

    def plan(self, metadata: AttentionMetadata) -> AttentionMetadata:
        starts = metadata.query_start_loc[: metadata.num_requests + 1]
        if not torch.equal(starts.diff(), metadata.seq_lens[: metadata.num_requests]):
            raise InternalError("dense attention keeps no context: a request must bring all its tokens in one step")
        metadata.handle = starts.tolist()
        return metadata

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
        spec, heads, kv_heads, dim = self.spec, self.spec.num_heads, self.spec.kv.num_kv_heads, self.spec.kv.head_dim
        widths = [heads * dim, kv_heads * dim] + [kv_heads * spec.kv.v_head_dim] * (not spec.kv.latent)
        q, k, *rest = (x.unflatten(-1, (-1, spec.kv.v_head_dim if i == 2 else dim)) for i, x in enumerate(qkv_TC.split(widths, dim=-1)))
        v = rest[0] if rest else k[..., : spec.kv.v_head_dim]
        turned = slice(dim - spec.rotary_dim, dim) if spec.kv.latent else slice(spec.rotary_dim)
        for x, weight in ((q, q_norm_D), (k, k_norm_D)):
            if weight is not None and spec.qk_norm_eps is not None:
                x.copy_(self._ops.rms_norm(x.reshape(-1, dim), weight, spec.qk_norm_eps).view(x.shape))
            self._ops.rotate(x[..., turned], positions_T, self._cos_sin, spec.interleaved)
        out = out_TC.unflatten(-1, (heads, -1))
        for first, last in zip(metadata.handle[:-1], metadata.handle[1:], strict=True):
            rows = slice(first, last)
            mask = visible(last - first, spec.kv.sliding_window)
            query, key, value = (x[rows].transpose(0, 1) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=spec.scale, enable_gqa=True)
            out[rows] = attended.transpose(0, 1)
        return out_TC


def visible(length: int, window: int | None) -> Tensor:
    """[query, key]: True where a query sees a key, at most `window` tokens back, itself included."""
    visible = torch.ones(length, length, dtype=torch.bool).tril_()
    return visible if window is None else visible.triu_(1 - window)
