"""Mixtral (arXiv:2401.04088): Mistral's decoder with a mixture of experts in every layer."""

from __future__ import annotations

from apportion.layers.moe import MixtureOfExperts
from apportion.layers.site import Site
from apportion.models.decoder import Decoder, DecoderLayer
from apportion.models.llama import LlamaAttention

# Published checkpoints spell the mixture in their own way; transformers 5 has it as every other family.
ALIASES = (
    (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
    (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
    (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
    (r"\.block_sparse_moe\.", r".mlp."),
)


def mixtral(site: Site) -> Decoder:
    def layer(site: Site, index: int) -> DecoderLayer:
        return DecoderLayer(site, LlamaAttention(site / "self_attn", index), MixtureOfExperts(site / "mlp"))

    return Decoder(site, layer, ALIASES)
