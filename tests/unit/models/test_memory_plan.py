"""The bytes that a spec promises are those that a built model takes."""

from __future__ import annotations

import pytest
import torch

from apportion.core.model_spec import ModelSpec
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.loader import build_model, layout
from apportion.parallel.groups import ParallelGroup
from apportion.quant.scheme import LinearRecords

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "head_dim": 64,
    "num_key_value_heads": 8, "num_hidden_layers": 16, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True,
    "dtype": "bfloat16",
}  # fmt: skip
QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "num_hidden_layers": 24, "vocab_size": 151936, "max_position_embeddings": 32768, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("config", [LLAMA_1B, QWEN_05B], ids=lambda config: config["architectures"][0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [1, 2])
def test_weight_bytes(config, dtype, size):
    spec = ModelSpec.from_hf(config)
    nbytes = layout(build_model(spec, ReferenceOps(), ParallelGroup(size - 1, size), LinearRecords(dtype)))["nbytes"]
    assert spec.weight_bytes(dtype, size) == pytest.approx(nbytes, rel=0.01)


def test_activation_bytes(tiny, load, logits_of):
    """Slots of 64 tokens, a power of two."""
    loaded = load(tiny.write())
    logits_of(loaded.model, list(range(64)))
    slots = loaded.model.site.activations._storage.values()
    taken = sum(slot.numel() * 4 for slot in slots)
    promised = loaded.spec.activation_bytes(64, 64)
    unused = tiny.config["vocab_size"] + 2 * tiny.config["intermediate_size"]  # a copy of the logits; gates and ups, combined unstored
    assert taken <= promised < taken + 64 * unused * 4 + 1
    assert all(slot.dtype == torch.float32 for slot in slots)
