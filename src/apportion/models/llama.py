"""Llama 2, 3 and 3.x, Mistral, Qwen2 and Qwen3: one decoder. They differ by facts of the spec (biases, per-head norms, windows, rope)."""

from __future__ import annotations

from torch import Tensor, nn

from apportion.attention.backend import ForwardContext
from apportion.layers.attention import Attention
from apportion.layers.embedding import VocabularyMatrix
from apportion.layers.linear import qkv, row_parallel
from apportion.layers.mlp import GatedMLP
from apportion.layers.norm import RMSNorm
from apportion.layers.site import Site


class LlamaAttention(nn.Module):
    def __init__(self, site: Site, layer: int) -> None:
        super().__init__()
        spec = site.spec
        self.qkv_proj = qkv(site, spec.hidden, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.qkv_bias)
        q_norm = RMSNorm(site / "q_norm", spec.head_dim) if spec.qk_norm else None
        k_norm = RMSNorm(site / "k_norm", spec.head_dim) if spec.qk_norm else None
        self.attention = Attention(site, layer, q_norm, k_norm)
        self.o_proj = row_parallel(site / "o_proj", spec.hidden, spec.num_heads * spec.head_dim, "delta", spec.out_bias)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return self.o_proj.forward(self.attention.forward(self.qkv_proj.forward(x), context))


class LlamaDecoderLayer(nn.Module):
    def __init__(self, site: Site, layer: int) -> None:
        super().__init__()
        spec = site.spec
        self.input_layernorm = RMSNorm(site / "input_layernorm", spec.hidden)
        self.self_attn = LlamaAttention(site / "self_attn", layer)
        self.post_attention_layernorm = RMSNorm(site / "post_attention_layernorm", spec.hidden)
        self.mlp = GatedMLP(site / "mlp", spec.ffn, spec.mlp_bias)

    def forward(self, delta: Tensor | None, residual: Tensor, context: ForwardContext) -> Tensor:
        """delta: what the layer before adds to the residual stream, which is updated in place; returns what this one adds."""
        normed = self.input_layernorm.forward(residual) if delta is None else self.input_layernorm.forward(delta, residual)
        attended = self.self_attn.forward(normed, context)
        return self.mlp.forward(self.post_attention_layernorm.forward(attended, residual))


class LlamaForCausalLM(nn.Module):
    """models/interface.CausalLM."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        spec = site.spec
        self.site = site
        self.embed_tokens = VocabularyMatrix(site / "model.embed_tokens")
        self.layers = nn.ModuleList(LlamaDecoderLayer(site / f"model.layers.{i}", i) for i in range(spec.num_layers))
        self.norm = RMSNorm(site / "model.norm", spec.hidden, "hidden")
        self.lm_head = self.embed_tokens if spec.tied else VocabularyMatrix(site / "lm_head")

    def forward(self, token_ids_T: Tensor, context: ForwardContext) -> Tensor:
        residual = self.embed_tokens.embed(token_ids_T)
        delta = None
        for layer in self.layers:
            delta = layer.forward(delta, residual, context)
        return self.norm.forward(delta, residual)

    def compute_logits(self, hidden_RM: Tensor) -> Tensor:
        return self.lm_head.logits(hidden_RM)
