"""Llama, Mistral, Qwen2, Qwen3 in odd sizes."""

from __future__ import annotations

import pytest

from .comparison import HEADS, Family, checkpoint_of, hold_ranks_to_transformers, hold_to_transformers, rope

FAMILIES = [
    Family("llama2", "LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    Family("llama-gqa7-head8-tied-bf16", "LlamaConfig",
           {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True}, "bfloat16"),
    Family("llama-head80-sharded-fp16", "LlamaConfig",
           {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80}, "float16", "60KB"),
    Family("llama3-biases", "LlamaConfig", HEADS | {"attention_bias": True, "mlp_bias": True}
           | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)),
    Family("llama-linear", "LlamaConfig", HEADS | rope("linear", factor=4.0)),
    Family("llama-dynamic", "LlamaConfig", HEADS | {"max_position_embeddings": 48} | rope("dynamic", factor=4.0), one_by_one=True),
    Family("llama-yarn", "LlamaConfig", HEADS | rope("yarn", factor=8.0, original_max_position_embeddings=32)),
    Family("llama-yarn-mscale", "LlamaConfig",
           HEADS | rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, mscale=0.8, mscale_all_dim=0.5)),
    Family("mistral-window", "MistralConfig", HEADS | {"sliding_window": 11}),
    Family("mistral-full-tied", "MistralConfig", HEADS | {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True}),
    Family("qwen2", "Qwen2Config", HEADS | {"tie_word_embeddings": True}),
    Family("qwen2-two-windows", "Qwen2Config",
           HEADS | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    Family("qwen3-bf16", "Qwen3Config", HEADS | {"head_dim": 24, "tie_word_embeddings": True}, "bfloat16"),
    Family("qwen3-alternating", "Qwen3Config", HEADS | {
        "num_hidden_layers": 3, "head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 33,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request, make_checkpoint):
    return request.param, *checkpoint_of(request.param, make_checkpoint)


def test_equal_to_transformers(case, kernels, make_driver):
    family, folder, reference = case
    hold_to_transformers(family, folder, reference, make_driver(folder, kernels))


def test_two_ranks_equal_transformers(case, make_driver):
    family, folder, reference = case
    if family.fields.get("num_attention_heads", 0) % 2:
        pytest.skip(f"{family.fields['num_attention_heads']} heads cannot be cut in two")
    hold_ranks_to_transformers(family, folder, reference, make_driver)
