"""Whatever stands in a config.json, the answer is a spec or one of our errors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.core.errors import ApportionError
from apportion.core.hf_config import ARCHITECTURES
from apportion.core.model_spec import ModelSpec

FIELDS = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
    "vocab_size": 100, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": 16, "sliding_window": 32, "use_sliding_window": True,
    "max_window_layers": 2, "layer_types": ["full_attention", "full_attention", "sliding_attention"], "eos_token_id": [1, 2],
    "bos_token_id": 0, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [0], "shared_expert_intermediate_size": 40, "qkv_bias": True,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "scoring_func": "softmax",
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "moe_layer_freq": 1, "quantization_config": None,
}  # fmt: skip
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 200),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-1, 5), st.text(max_size=2), st.none()), max_size=4),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "x"]), st.one_of(st.integers(-1, 3), st.text(max_size=2), st.none())),
)


def fields_of(architecture: str) -> dict:
    return FIELDS | {"architectures": [architecture], "norm_topk_prob": not architecture.startswith("Deepseek")}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_fields_make_a_spec(architecture):
    ModelSpec.from_hf(fields_of(architecture))


@settings(max_examples=400, deadline=None)
@given(architecture=st.sampled_from(sorted(ARCHITECTURES)), changes=st.dictionaries(st.sampled_from(sorted(FIELDS)), JUNK, max_size=2))
def test_junk_is_refused_in_one_sentence(architecture, changes):
    try:
        spec = ModelSpec.from_hf(fields_of(architecture) | changes)
        assert len(spec.windows) == spec.num_layers and spec.kv_groups("auto", 32) and spec.num_parameters > 0
        assert ModelSpec.from_dict(spec.as_dict()) == spec
    except ApportionError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["architectures", *sorted(FIELDS["rope_scaling"])]), junk=JUNK)
def test_junk_in_names_and_rope(name, junk):
    config = FIELDS | {"architectures": ["LlamaForCausalLM"]}
    changed = config | {name: junk} if name in config else config | {"rope_scaling": FIELDS["rope_scaling"] | {name: junk}}
    try:
        ModelSpec.from_hf(changed)
    except ApportionError:
        pass
