"""What is read from config.json, in old and new spelling; KV groups and bytes; what is refused."""

from __future__ import annotations

import json

import pytest

from apportion.core.errors import CheckpointError, InvalidParameter, Unsupported
from apportion.core.model_spec import ModelSpec

OLD = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "torch_dtype": "bfloat16", "eos_token_id": [128001, 128009], "bos_token_id": 128000,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                     "rope_type": "llama3"},
}  # fmt: skip


def spec_of(**changes) -> ModelSpec:
    return ModelSpec.from_hf({k: v for k, v in (OLD | changes).items() if v is not ...})


def test_llama_3_1():
    spec = spec_of()
    assert (spec.head_dim, spec.num_kv_heads, spec.dtype, spec.tied, spec.max_position) == (128, 8, "bfloat16", False, 131072)
    assert spec.eos_token_ids == (128001, 128009)
    assert spec.num_parameters == 8_030_261_248  # as the model card counts
    assert spec.rope.scaling == "llama3" and spec.rope.parameters["original_max_position_embeddings"] == 8192
    assert spec.kv_bytes_per_token("auto", 32) == 32 * 2 * 8 * 128 * 2
    assert spec.weight_bytes() == pytest.approx(2 * spec.num_parameters, rel=1e-3)
    assert spec.weight_bytes("float32", tp_size=2) == pytest.approx(2 * spec.num_parameters, rel=1e-3)


def test_both_spellings_agree():
    new = spec_of(
        rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="bfloat16", rope_parameters=OLD["rope_scaling"] | {"rope_theta": 500000.0}
    )
    assert new == spec_of()
    assert spec_of(rope_scaling={"type": "linear", "factor": 2.0}).rope.scaling == "linear"


def test_json_round_trip():
    for spec in (spec_of(), spec_of(architectures=["MistralForCausalLM"], sliding_window=4096)):
        assert ModelSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 8192),
        ({"rope_type": "dynamic", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "default"}, 4096),
    ],
)
def test_longest_context(scaling, reach):
    assert spec_of(max_position_embeddings=4096, rope_scaling=scaling).max_position == reach


def test_mistral_windows():
    layers = OLD["num_hidden_layers"]
    assert spec_of(architectures=["MistralForCausalLM"], sliding_window=4096).windows == (4096,) * layers
    assert spec_of(architectures=["MistralForCausalLM"], sliding_window=None).windows == (None,) * layers
    (group,) = spec_of(architectures=["MistralForCausalLM"], sliding_window=4096).kv_groups("float16", 64)
    assert (group.sliding_window, group.layers, group.format.name, group.block_size) == (4096, tuple(range(layers)), "float16", 64)


def test_qwen_windows_make_two_groups():
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 1024}
    assert set(spec_of(**qwen, use_sliding_window=False, max_window_layers=4).windows) == {None}
    full, window = spec_of(**qwen, use_sliding_window=True, max_window_layers=4).kv_groups("auto", 32)
    assert (full.sliding_window, full.layers) == (None, (0, 1, 2, 3))
    assert (window.sliding_window, window.layers) == (1024, tuple(range(4, 32)))
    kinds = ["sliding_attention", "full_attention"] * 16
    first, _ = spec_of(**qwen, use_sliding_window=True, layer_types=kinds).kv_groups("auto", 32)
    assert (first.sliding_window, first.layers[:2]) == (1024, (0, 2))


def test_family_facts():
    qwen3 = spec_of(architectures=["Qwen3ForCausalLM"], head_dim=None, num_attention_heads=64)
    assert (qwen3.head_dim, qwen3.rope.rotary_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, 128, True, False)
    qwen2 = spec_of(architectures=["Qwen2ForCausalLM"])
    assert (qwen2.qk_norm, qwen2.qkv_bias, qwen2.out_bias) == (False, True, False)
    llama = spec_of(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias) == (True, True, True)


def test_heads_of_ranks():
    spec = spec_of()
    assert [spec.kv_heads_per_rank(size) for size in (1, 2, 8, 16, 32)] == [8, 4, 1, 1, 1]
    assert spec.kv_groups("auto", 32, tp_size=2)[0].num_kv_heads == 4
    with pytest.raises(InvalidParameter, match="does not divide the 32 attention heads"):
        spec.kv_groups("auto", 32, tp_size=3)
    with pytest.raises(InvalidParameter, match="one must divide the other"):
        spec_of(num_attention_heads=30, num_key_value_heads=3, head_dim=8).kv_heads_per_rank(2)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, Unsupported, r"unknown architecture 'GPT2LMHeadModel'; known: .*LlamaForCausalLM"),
        ({"architectures": ...}, Unsupported, "names no architectures"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, Unsupported, "unknown rope type 'longrope'; known: default, linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "warmth": 1}}, Unsupported, "unknown rope parameter 'warmth'"),
        ({"rope_scaling": {"rope_type": "linear"}}, CheckpointError, "factor must be a positive number, got None"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, Unsupported, "per layer type"),
        ({"hidden_size": ...}, CheckpointError, "hidden_size must be a positive integer, got None"),
        ({"num_hidden_layers": "32"}, CheckpointError, "num_hidden_layers must be a positive integer, got '32'"),
        ({"tie_word_embeddings": 1}, CheckpointError, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "gelu"}, Unsupported, "unknown hidden_act 'gelu'; known: silu"),
        ({"torch_dtype": "float8"}, Unsupported, "unknown dtype 'float8'"),
        ({"num_key_value_heads": 5}, CheckpointError, "32 attention heads cannot share 5 key-value heads"),
        ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["chunked"] * 32}, Unsupported, "'chunked'"),
        ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": []}, CheckpointError, "names 0 layers"),
    ],
)  # fmt: skip
def test_refusals(changes, error, said):
    with pytest.raises(error, match=said):
        spec_of(**changes)
