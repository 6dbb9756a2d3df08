"""What every decoder shares: pre-norm residual layers between the two ends of the vocabulary. Knows no attention and no feed-forward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from apportion.attention.backend import ForwardContext
from apportion.layers.embedding import VocabularyMatrix
from apportion.layers.norm import RMSNorm
from apportion.layers.site import Site


class DecoderLayer(nn.Module):
    """self_attn: (x [T, M], context) -> [T, M]; mlp: x [T, M] -> [T, M]. One whose input a single linear takes has that as `entry`."""

    def __init__(self, site: Site, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(site / "input_layernorm", site.spec.hidden)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(site / "post_attention_layernorm", site.spec.hidden)
        self.mlp = mlp
        self.input_layernorm.feed(getattr(self_attn, "entry", None))
        self.post_attention_layernorm.feed(getattr(mlp, "entry", None))

    def forward(self, delta: Tensor | None, residual: Tensor, context: ForwardContext) -> Tensor:
        """delta: what the layer before adds to the residual stream, which is updated in place; returns what this one adds."""
        normed = self.input_layernorm.forward(residual) if delta is None else self.input_layernorm.forward(delta, residual)
        attended = self.self_attn.forward(normed, context)
        added: Tensor = self.mlp.forward(self.post_attention_layernorm.forward(attended, residual))
        return added


class Decoder(nn.Module):
    """models/interface.CausalLM. make_layer: (site of the layer, its index) -> DecoderLayer."""

    def __init__(self, site: Site, make_layer: Callable[[Site, int], DecoderLayer], aliases: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__()
        spec = site.spec
        self.site = site
        self.aliases = aliases
        self.embed_tokens = VocabularyMatrix(site / "model.embed_tokens")
        self.layers = nn.ModuleList(make_layer(site / f"model.layers.{i}", i) for i in range(spec.num_layers))
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
