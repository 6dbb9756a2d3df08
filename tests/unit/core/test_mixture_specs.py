"""Configs of mixtures and of latent attention as they are published: shapes, parameters as the model cards count them, what is refused."""

from __future__ import annotations

import json
import math

import pytest

from apportion.core.errors import CheckpointError, Unsupported
from apportion.core.model_spec import ModelSpec

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rope_theta": 1e6,
    "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "count"),
    [(MIXTRAL, 46_702_792_704), (QWEN2, 14_315_784_192), (QWEN3, 30_532_122_624), (DEEPSEEK, 15_706_484_224)],
    ids=["mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "deepseek-v2-lite"],
)
def test_parameters_as_published(config, count):
    spec = ModelSpec.from_hf(config)
    assert spec.num_parameters == count
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


def test_deepseek_caches_latents_and_warms_the_softmax():
    spec = ModelSpec.from_hf(DEEPSEEK)
    (group,) = spec.kv_groups("auto", 32, tp_size=2)
    assert (group.latent, group.num_kv_heads, group.head_dim, group.v_head_dim) == (True, 1, 576, 512)
    assert spec.kv_bytes_per_token("auto", 32) == 27 * 576 * 2
    assert spec.attention_scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)
    assert (spec.rope.rotary_dim, spec.rope.interleaved, spec.max_position) == (64, True, 163840)
    assert spec.latent.q_lora_rank == 0 and spec.moe.layers == tuple(range(1, 27))
    grouped = ModelSpec.from_hf(DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "q_lora_rank": 1536})
    assert (grouped.moe.num_groups, grouped.moe.top_groups, grouped.latent.q_lora_rank) == (8, 3, 1536)


def test_missing_fields_take_the_family_defaults():
    bare = {k: v for k, v in MIXTRAL.items() if k not in ("rope_theta", "rms_norm_eps", "num_key_value_heads", "num_local_experts")}
    assert ModelSpec.from_hf(bare) == ModelSpec.from_hf(MIXTRAL)
    renamed = {k: v for k, v in QWEN3.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert ModelSpec.from_hf(renamed) == ModelSpec.from_hf(QWEN3)


def test_which_layers_are_mixtures():
    sparse = ModelSpec.from_hf(QWEN2 | {"decoder_sparse_step": 3, "mlp_only_layers": [5]})
    assert sparse.moe.layers == (2, 8, 11, 14, 17, 20, 23)
    assert ModelSpec.from_hf(QWEN3 | {"mlp_only_layers": list(range(48))}).moe is None
    assert ModelSpec.from_hf(DEEPSEEK | {"n_routed_experts": None}).moe is None


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        (DEEPSEEK | {"topk_method": "noaux_tc"}, Unsupported, "unknown topk_method 'noaux_tc'; known: greedy, group_limited_greedy"),
        (DEEPSEEK | {"scoring_func": "sigmoid"}, Unsupported, "scoring_func 'sigmoid'"),
        (DEEPSEEK | {"norm_topk_prob": True}, Unsupported, "norm_topk_prob"),
        (DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 7, "topk_group": 3}, CheckpointError, "64 experts do not form 7"),
        (DEEPSEEK | {"num_experts_per_tok": None}, CheckpointError, "num_experts_per_tok must be a positive integer"),
        (QWEN3 | {"num_experts_per_tok": 129}, CheckpointError, "129 of 128 experts"),
        (MIXTRAL | {"num_local_experts": 1}, CheckpointError, "2 of 1 experts"),
    ],
)
def test_refusals(config, error, said):
    with pytest.raises(error, match=said):
        ModelSpec.from_hf(config)
