"""Scales of cached keys and values: every spelling in use, and what makes no sense."""

from __future__ import annotations

import pytest
import torch

from apportion.core.config import ModelConfig
from apportion.core.errors import CheckpointError, Unsupported
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import read_spec
from apportion.models.loader import attach_model, load_model
from tests.unit.quant import packers
from tests.unit.quant.test_checkpoints import FP8

STEM = "model.layers.1.self_attn"
TWO = torch.tensor([0.25, 0.5])


def load(folder):
    return load_model(ModelConfig(model=str(folder)), read_spec(folder), ReferenceOps())


def scales_of(model, layer):
    return model.layers[layer].self_attn.attention.kv_scales


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"k_scale": torch.tensor(0.25), "v_scale": torch.tensor(0.5)}, [[0.25, 0.25], [0.5, 0.5]]),
        ({"attn.k_scale": torch.tensor([0.25]), "attn.v_scale": torch.tensor([0.5])}, [[0.25, 0.25], [0.5, 0.5]]),
        ({"k_proj.k_scale": TWO, "v_proj.v_scale": torch.tensor([3.0])}, [[0.25, 0.5], [3, 3]]),
        ({"k_proj.output_scale": TWO.clone().view(2, 1, 1), "v_proj.output_scale": TWO.flip(0).bfloat16()}, [[0.25, 0.5], [0.5, 0.25]]),
        ({"kv_scale": torch.tensor(0.125)}, [[0.125, 0.125], [0.125, 0.125]]),
        ({"k_scale": TWO.clone(), "v_scale": TWO + 0, "q_scale": TWO * 3, "prob_output_scale": torch.ones(1)}, [[0.25, 0.5], [0.25, 0.5]]),
    ],
)
def test_names(tmp_path, named, expected):
    tensors = packers.floats() | {f"{STEM}.{name}": value for name, value in named.items()}
    loaded = load(packers.write(tmp_path, tensors))
    for model in (loaded.model, attach_model(loaded.manifest, loaded.arena, ReferenceOps()).model):
        assert scales_of(model, 1).calibrated and not scales_of(model, 0).calibrated
        assert scales_of(model, 1).values.tolist() == expected
        assert scales_of(model, 0).values.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"k_scale": torch.tensor(0.5)}, "it takes both: model.layers.1.self_attn.k_scale"),
        ({"k_scale": torch.tensor(0.0), "v_scale": torch.tensor(1.0)}, r"self_attn.k_scale holds a scale that is zero"),
        ({"k_scale": torch.tensor(1.0), "v_scale": torch.tensor(float("nan"))}, r"self_attn.v_scale holds a scale that is NaN"),
        ({"k_scale": torch.ones(3), "v_scale": torch.ones(3)}, r"self_attn.k_scale must have shape .* has \[3\]"),
    ],
)
def test_nonsense_is_named(tmp_path, named, said):
    with pytest.raises(CheckpointError, match=said):
        load(packers.write(tmp_path, packers.floats() | {f"{STEM}.{name}": value for name, value in named.items()}))


@pytest.mark.parametrize(
    ("scheme", "said"), [({"num_bits": 4}, "kv_cache_scheme.num_bits is 4"), ({"num_bits": 8, "type": "int"}, "type is 'int'")]
)
def test_schemes_of_other_numbers_are_refused(tmp_path, scheme, said):
    with pytest.raises(Unsupported, match=said):
        load(packers.write(tmp_path, packers.floats(), FP8 | {"kv_cache_scheme": scheme}))
