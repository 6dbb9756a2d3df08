"""DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention, and mixtures with shared experts after the first dense layers."""

from __future__ import annotations

from torch import Tensor, nn

from apportion.attention.backend import ForwardContext
from apportion.core.errors import InternalError
from apportion.layers.attention import Attention
from apportion.layers.linear import HeadLinear, column_parallel, replicated, row_parallel
from apportion.layers.mlp import GatedMLP
from apportion.layers.moe import MixtureOfExperts
from apportion.layers.norm import RMSNorm
from apportion.layers.site import Site
from apportion.layers.weights import Shard
from apportion.models.decoder import Decoder, DecoderLayer

LATENT_NORM_EPS = 1e-6  # of the norms inside attention, whatever the model's own epsilon


class LatentAttention(nn.Module):
    """Section 2.1, absorbed: W_UK goes into the queries and W_UV comes after attention, so the cache holds latents only."""

    def __init__(self, site: Site, layer: int) -> None:
        super().__init__()
        spec, m = site.spec, site.spec.latent
        if m is None:
            raise InternalError(f"{site.name} is built as latent attention, but the model's spec has none")
        self.latent = m
        self.heads = Shard.even(spec.num_heads, site.group)
        q_width, v_width = spec.num_heads * spec.head_dim, spec.num_heads * m.v_dim
        if m.q_lora_rank:
            self.q_a_proj = replicated(site / "q_a_proj", m.q_lora_rank, spec.hidden, "q_latent", spec.qkv_bias)
            self.q_a_layernorm = RMSNorm(site / "q_a_layernorm", m.q_lora_rank, "q_latent_normed", LATENT_NORM_EPS)
            self.q_proj = column_parallel(site / "q_b_proj", q_width, m.q_lora_rank, "q")
            self.q_a_layernorm.feed(self.q_proj)
        else:
            self.q_proj = column_parallel(site / "q_proj", q_width, spec.hidden, "q")
        width = m.kv_lora_rank + m.qk_rope_dim
        self.kv_a_proj = replicated(site / "kv_a_proj_with_mqa", width, spec.hidden, "kv_latent", spec.qkv_bias)
        self.kv_a_layernorm = RMSNorm(site / "kv_a_layernorm", m.kv_lora_rank, "kv_latent_normed", LATENT_NORM_EPS)
        keys, values = slice(0, m.qk_nope_dim), slice(m.qk_nope_dim, m.qk_nope_dim + m.v_dim)
        kv_b = site / "kv_b_proj"
        self.absorb = HeadLinear(kv_b, self.heads, values.stop, m.kv_lora_rank, keys, transposed=True)
        self.expand = HeadLinear(kv_b, self.heads, values.stop, m.kv_lora_rank, values)
        self.attention = Attention(site, layer, value_dim=m.kv_lora_rank)
        self.o_proj = row_parallel(site / "o_proj", spec.hidden, v_width, "delta", spec.out_bias)
        self._activations = site.activations

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        m, num_tokens, heads = self.latent, x.shape[0], self.heads.count
        take = self._activations.take
        if m.q_lora_rank:
            x_q = self.q_a_layernorm.forward(self.q_a_proj.forward(x))
        else:
            x_q = x
        q_THD = self.q_proj.forward(x_q).unflatten(-1, (heads, -1))
        latent = self.kv_a_proj.forward(x)
        joint = take("absorbed", num_tokens, (heads + 1) * latent.shape[1])  # H absorbed queries, then the token's own latent
        joint_THD = joint.unflatten(-1, (heads + 1, -1))
        self.absorb.forward(q_THD[..., : m.qk_nope_dim], joint_THD[:, :heads, : m.kv_lora_rank])
        joint_THD[:, :heads, m.kv_lora_rank :] = q_THD[..., m.qk_nope_dim :]
        joint_THD[:, heads, : m.kv_lora_rank] = self.kv_a_layernorm.forward(latent[:, : m.kv_lora_rank])
        joint_THD[:, heads, m.kv_lora_rank :] = latent[:, m.kv_lora_rank :]
        attended = self.attention.forward(joint, context)
        values = take("values", num_tokens, heads * m.v_dim)
        self.expand.forward(attended.unflatten(-1, (heads, -1)), values.unflatten(-1, (heads, -1)))
        return self.o_proj.forward(values)


def deepseek_v2(site: Site) -> Decoder:
    moe = site.spec.moe
    mixtures = frozenset(moe.layers if moe else ())
    shared = "shared_experts" if moe and moe.num_shared else ""

    def layer(site: Site, index: int) -> DecoderLayer:
        spec = site.spec
        mlp = MixtureOfExperts(site / "mlp", shared) if index in mixtures else GatedMLP(site / "mlp", spec.ffn, spec.mlp_bias)
        return DecoderLayer(site, LatentAttention(site / "self_attn", index), mlp)

    return Decoder(site, layer)
