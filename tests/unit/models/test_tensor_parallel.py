"""Ranks hold shards that together make the model: two and four ranks in threads against one."""

from __future__ import annotations

import pytest
import torch

from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model, weight_layers
from apportion.parallel.groups import ParallelGroup
from tests.ranks import on_ranks

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
