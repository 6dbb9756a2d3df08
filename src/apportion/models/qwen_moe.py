"""Qwen2-MoE and Qwen3-MoE: the Qwen decoders with mixtures of experts in most layers; Qwen2's has a shared expert behind a sigmoid gate."""

from __future__ import annotations

from apportion.layers.mlp import GatedMLP
from apportion.layers.moe import MixtureOfExperts
from apportion.layers.site import Site
from apportion.models.decoder import Decoder, DecoderLayer
from apportion.models.llama import LlamaAttention


def qwen_moe(site: Site) -> Decoder:
    moe = site.spec.moe
    mixtures = frozenset(moe.layers if moe else ())
    shared = ("shared_expert", "shared_expert_gate") if moe and moe.num_shared else ("", "")

    def layer(site: Site, index: int) -> DecoderLayer:
        mlp = MixtureOfExperts(site / "mlp", *shared) if index in mixtures else GatedMLP(site / "mlp", site.spec.ffn)
        return DecoderLayer(site, LlamaAttention(site / "self_attn", index), mlp)

    return Decoder(site, layer)
