"""Mixtral, Qwen2-MoE, Qwen3-MoE and DeepSeek-V2 in odd sizes, their experts one by one or fused."""

from __future__ import annotations

import pytest

from .comparison import HEADS, Family, checkpoint_of, hold_ranks_to_transformers, hold_to_transformers, rope

QWEN = HEADS | {"moe_intermediate_size": 20, "num_experts": 7, "num_experts_per_tok": 3}
LATENT = {
    "num_attention_heads": 6, "num_key_value_heads": 6, "kv_lora_rank": 20, "q_lora_rank": None, "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 6, "v_head_dim": 10, "num_hidden_layers": 3, "first_k_dense_replace": 1, "moe_intermediate_size": 20,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "routed_scaling_factor": 1.7,
}  # fmt: skip
YARN = rope("yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0, mscale=0.7, mscale_all_dim=0.9)

FAMILIES = [
    Family("mixtral", "MixtralConfig", HEADS | {"num_local_experts": 5}),
    Family("mixtral-window-tied-bf16", "MixtralConfig",
           HEADS | {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 13, "tie_word_embeddings": True},
           "bfloat16", "60KB"),
    Family("mixtral-fused", "MixtralConfig", HEADS | {"num_local_experts": 5}, fused=True),
    Family("qwen2-moe", "Qwen2MoeConfig", QWEN | {"shared_expert_intermediate_size": 28}),
    Family("qwen2-moe-sparse-windows", "Qwen2MoeConfig", QWEN | {
        "num_hidden_layers": 5, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "norm_topk_prob": True, "qkv_bias": False, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, fused=True),
    Family("qwen3-moe-tied", "Qwen3MoeConfig", QWEN | {"head_dim": 24, "norm_topk_prob": True, "tie_word_embeddings": True}),
    Family("qwen3-moe-fused-biases", "Qwen3MoeConfig", QWEN | {"head_dim": 16, "attention_bias": True, "mlp_only_layers": [0]}, fused=True),
    Family("qwen3-moe-window", "Qwen3MoeConfig", QWEN | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 21}),
    Family("deepseek-v2-lite", "DeepseekV2Config", LATENT | YARN | {"rms_norm_eps": 1e-5}),
    Family("deepseek-v2-groups", "DeepseekV2Config", LATENT | {
        "q_lora_rank": 18, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "attention_bias": True}),
    Family("deepseek-v2-fused-bf16", "DeepseekV2Config", LATENT | {"q_lora_rank": 18, "tie_word_embeddings": True}, "bfloat16", fused=True),
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
