"""The dense model, to which every strategy is held, has the right gradients: those of finite differences, weight by weight."""

import numpy as np
import pytest

from apportion.simulator.interpreter import dense
from tests.papers.proteus import arrays_of
from tests.papers.test_proteus_compiler import MODELS


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_gradients_are_those_of_finite_differences(model):
    arrays = arrays_of(model, "sgd", seed=1)
    got = dense(model, arrays, "sgd")
    draw = np.random.default_rng(2)
    for name in [t.name for t in model.tensors.values() if t.kind == "weight"]:
        direction = draw.normal(size=arrays[name].shape)
        step = 1e-6
        up, down = (float(dense(model, arrays | {name: arrays[name] + sign * step * direction}, None)["loss"]) for sign in (1, -1))
        slope = float((got[f"grad:{name}"] * direction).sum())
        assert slope == pytest.approx((up - down) / (2 * step), rel=2e-4, abs=1e-7), name


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_no_gradient_vanishes(model):
    got = dense(model, arrays_of(model, "sgd", seed=1), "sgd")
    dead = [name for name, value in got.items() if name.startswith("grad:") and not np.abs(value).max() > 0]
    assert not dead
