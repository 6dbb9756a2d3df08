"""Ranks hold shards that together make the model: two and four ranks in threads against one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import ModelSpec
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import read_spec
from apportion.models.loader import attach_model, build_model, load_model, weight_layers
from apportion.parallel.groups import ParallelGroup
from apportion.quant.scheme import LinearRecords
from tests.golden.conftest import Driver
from tests.ranks import on_ranks

CONFIG = {
    "hidden_size": 48, "intermediate_size": 70, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 101,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "dtype": "float32",
}  # fmt: skip
TOKENS = [3, 100, 0, 50, 51, 52, 77]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"), [(2, 6, 2), (2, 6, 1), (4, 4, 2), (3, 6, 3)], ids=["2", "2-shared-kv", "4-shared-kv", "3-uneven-ffn"]
)
def test_ranks_equal_one(tiny, make_shapes, logits_of, size, heads, kv_heads, tied):
    tiny.config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied, "head_dim": 48 // heads}
    generator = torch.Generator().manual_seed(1)
    tiny.tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in make_shapes(tiny.config).items()}
    folder = tiny.write()
    spec, config = read_spec(folder), ModelConfig(model=str(folder))
    whole = load_model(config, spec, ReferenceOps())
    expected = logits_of(whole.model, TOKENS)

    def run(group: ParallelGroup):
        loaded = load_model(config, spec, ReferenceOps(), group)
        return loaded.manifest["nbytes"], logits_of(loaded.model, TOKENS)

    results = on_ranks(size, run)
    for nbytes, logits in results:
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
        assert torch.equal(logits, results[0][1])  # every rank must sample the same token
        assert nbytes < whole.manifest["nbytes"] * (1.25 / size + 0.2)


def test_every_rank_takes_its_own_part(tiny):
    """Shards of a column-parallel matrix are disjoint and complete."""
    folder = tiny.write()
    spec, config = read_spec(folder), ModelConfig(model=str(folder))
    taken: dict[str, list[int]] = {}
    for rank in range(2):
        model = load_model(config, spec, ReferenceOps(), ParallelGroup(rank, 2)).model
        for layer in weight_layers(model):
            for source in layer.sources(()):
                rows = source.index[0].indices(source.shape[0])
                taken.setdefault(source.name, []).extend(range(*rows) if len(source.shape) == 2 else [])
    assert sorted(taken["model.layers.0.self_attn.k_proj.weight"]) == list(range(16))
    assert sorted(taken["model.layers.0.mlp.up_proj.weight"]) == list(range(70))
    assert sorted(taken["lm_head.weight"]) == list(range(101))
    assert sorted(taken["model.layers.0.mlp.down_proj.weight"]) == sorted([*range(48), *range(48)])  # cut by columns


def test_heads_that_cannot_be_cut_are_refused(tiny):
    folder = tiny.write()
    with pytest.raises(InvalidParameter, match="tensor_parallel_size 4 does not divide the 6 attention heads"):
        load_model(ModelConfig(model=str(folder)), read_spec(folder), ReferenceOps(), ParallelGroup(0, 4))


MIXTURES = {
    "MixtralForCausalLM": {"num_local_experts": 4, "num_key_value_heads": 2},
    "Qwen2MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 22, "shared_expert_intermediate_size": 30, "num_experts_per_tok": 2},
    "DeepseekV2ForCausalLM": {
        "n_routed_experts": 4, "moe_intermediate_size": 22, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": 20, "q_lora_rank": 18, "qk_nope_head_dim": 14, "qk_rope_head_dim": 6, "v_head_dim": 10, "attention_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("architecture", MIXTURES)
def test_ranks_of_a_mixture_equal_one(tmp_path, logits_of, architecture):
    config = CONFIG | {"architectures": [architecture]} | MIXTURES[architecture]
    spec = ModelSpec.from_hf(config)
    blank = build_model(spec, ReferenceOps(), ParallelGroup(), LinearRecords("float32"))
    generator = torch.Generator().manual_seed(5)
    shapes = {source.name: source.shape for layer in weight_layers(blank) for source in layer.sources(())}
    save_file({name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model_config = ModelConfig(model=str(tmp_path))
    whole = load_model(model_config, spec, ReferenceOps())
    expected = logits_of(whole.model, TOKENS)

    def run(group: ParallelGroup):
        loaded = load_model(model_config, spec, ReferenceOps(), group)
        return loaded.manifest["nbytes"], logits_of(loaded.model, TOKENS)

    for nbytes, logits in on_ranks(2, run):
        torch.testing.assert_close(logits, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
        assert nbytes < 0.85 * whole.manifest["nbytes"]
    paged = Driver(tmp_path, "reference", max_requests=1).step([TOKENS], [0])
    torch.testing.assert_close(paged, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)  # with a cache and without
    mapped = attach_model(json.loads(json.dumps(whole.manifest)), whole.arena, ReferenceOps())
    assert torch.equal(logits_of(mapped.model, TOKENS), expected)
