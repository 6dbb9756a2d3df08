"""Llama 2, 3 and 3.x, Mistral, Qwen2 and Qwen3: one decoder. They differ by facts of the spec (biases, per-head norms, windows, rope)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from apportion.attention.backend import ForwardContext
from apportion.layers.attention import Attention
from apportion.layers.linear import Linear, qkv, row_parallel
from apportion.layers.mlp import GatedMLP
from apportion.layers.norm import RMSNorm
from apportion.layers.site import Site
from apportion.models.decoder import Decoder, DecoderLayer


class LlamaAttention(nn.Module):
    def __init__(self, site: Site, layer: int) -> None:
        super().__init__()
        spec = site.spec
        self.qkv_proj = qkv(site, spec.hidden, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.qkv_bias)
        q_norm = RMSNorm(site / "q_norm", spec.head_dim) if spec.qk_norm else None
        k_norm = RMSNorm(site / "k_norm", spec.head_dim) if spec.qk_norm else None
        self.attention = Attention(site, layer, q_norm, k_norm)
        self.o_proj = row_parallel(site / "o_proj", spec.hidden, spec.num_heads * spec.head_dim, "delta", spec.out_bias)

    @property
    def entry(self) -> Linear:
        return self.qkv_proj

    def forward(self, x: Any, context: ForwardContext) -> Tensor:
        return self.o_proj.forward(self.attention.forward(self.qkv_proj.forward(x), context))


def llama(site: Site) -> Decoder:
    def layer(site: Site, index: int) -> DecoderLayer:
        return DecoderLayer(site, LlamaAttention(site / "self_attn", index), GatedMLP(site / "mlp", site.spec.ffn, site.spec.mlp_bias))

    return Decoder(site, layer)
