"""Norms and gates that round for the linear they feed, where its kernels want that: the same numbers as rounding by itself."""

from importlib.util import find_spec

import pytest
import torch

from apportion.core.config import ModelConfig
from apportion.kernels.ops import RoundedRows
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model
from tests.unit.quant import packers

pytestmark = pytest.mark.skipif(not find_spec("triton") or torch.cuda.is_available(), reason="needs Triton and its interpreter")


def load(folder, ops, quantization):
    return load_model(ModelConfig(model=str(folder), quantization=quantization), read_spec(folder), ops).model


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_a_layer_rounds_once_and_alike(tmp_path, monkeypatch, quantization):
    from apportion.kernels.triton import rounding
    from apportion.kernels.triton.ops import TritonOps

    folder = packers.write(tmp_path, packers.floats())
    mine, oracle = (load(folder, ops, quantization).layers[1] for ops in (TritonOps(True, torch.device("cpu"), 1 << 20), ReferenceOps()))
    x = torch.randn(5, mine.input_layernorm.width, generator=torch.Generator().manual_seed(1))
    expected = oracle.mlp.forward(oracle.input_layernorm.forward(x.clone()))

    def by_itself(*arguments, **options):
        raise AssertionError("rows were rounded in a pass of their own")

    monkeypatch.setattr(rounding.Rounding, "__call__", by_itself)
    normed = mine.input_layernorm.forward(x.clone())
    assert isinstance(normed, RoundedRows) and normed.scales.shape == (5, 1)
    torch.testing.assert_close(mine.mlp.forward(normed), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_a_layer_in_floating_point_passes_tensors(tmp_path):
    from apportion.kernels.triton.ops import TritonOps

    model = load(packers.write(tmp_path, packers.floats()), TritonOps(True, torch.device("cpu"), 1 << 20), None)
    assert isinstance(model.layers[0].input_layernorm.forward(torch.ones(2, model.layers[0].input_layernorm.width)), torch.Tensor)


def test_who_watches_inputs_sees_them_unrounded(tmp_path):
    from apportion.kernels.triton.ops import TritonOps

    layer = load(packers.write(tmp_path, packers.floats()), TritonOps(True, torch.device("cpu"), 1 << 20), "fp8").layers[0]
    seen, op = [], layer.self_attn.qkv_proj.op
    layer.self_attn.qkv_proj.op = lambda x, out: op(seen.append(x) or x, out)
    layer.self_attn.qkv_proj.forward(layer.input_layernorm.forward(torch.ones(2, layer.input_layernorm.width)))
    assert isinstance(seen[0], torch.Tensor)
