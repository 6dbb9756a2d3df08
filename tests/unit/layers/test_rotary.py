"""Rotary tables against transformers' own frequencies."""

from __future__ import annotations

import pytest
import torch

from apportion.core.model_spec import ModelSpec
from apportion.layers.rotary import cos_sin_table, inverse_frequencies

SCALINGS = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-exact": {"factor": 16.0, "original_max_position_embeddings": 128, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn-factor": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    "yarn-mscale": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn-ratio": {"factor": None, "original_max_position_embeddings": 64},
    "partial": {"partial_rotary_factor": 0.5},
}


def config_of(kind: str, numbers: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 8, "num_attention_heads": 4, "num_hidden_layers": 1,
        "vocab_size": 8, "max_position_embeddings": 256, "rope_parameters": {"rope_type": kind, "rope_theta": 500000.0, **numbers},
    }  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = name.split("-")[0].replace("partial", "default")
    config = config_of(kind, SCALINGS[name])
    rope = ModelSpec.from_hf(config).rope
    theirs = transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"})
    if kind == "default":
        dim = rope.rotary_dim
        assert dim == (16 if name == "partial" else 32)
        expected, factor = 1.0 / (500000.0 ** (torch.arange(0, dim, 2).float() / dim)), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    frequencies, own_factor = inverse_frequencies(rope)
    assert torch.equal(frequencies, expected) and own_factor == factor
    table = cos_sin_table(rope, 300)
    angles = torch.arange(300)[:, None].float() * expected
    assert torch.equal(table, torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1))


def test_dynamic_equals_transformers_token_by_token():
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of("dynamic", {"factor": 2.5})
    config["max_position_embeddings"] = 40
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"}))
    table = cos_sin_table(ModelSpec.from_hf(config).rope, 100)
    for position in range(100):
        cos, sin = theirs(torch.zeros(1), torch.tensor([[position]]))
        torch.testing.assert_close(table[position], torch.cat([cos[0, 0, :16], sin[0, 0, :16]]), atol=2e-5, rtol=0)
