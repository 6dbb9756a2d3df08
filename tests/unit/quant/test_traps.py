"""What real files do that a reader does not expect: fused projections and experts, experts that no token reached, other float8 bytes."""

from __future__ import annotations

import pytest
import torch

from apportion.core.errors import CheckpointError
from tests.unit.models.conftest import dense_logits
from tests.unit.quant import packers
from tests.unit.quant.test_checkpoints import CASES, FP8, TOKENS, load, loaded_weights

FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def joined(tensors: dict, axis: dict[str, int]) -> dict:
    """q, k and v, gate and up of a checkpoint as one matrix each. axis: where a tensor of this suffix has its outputs."""
    tensors = dict(tensors)
    for layer in range(2):
        for fused, parts in FUSED.items():
            stem = f"model.layers.{layer}.{fused.rpartition('.')[0]}"
            for suffix, along in axis.items():
                pieces = [tensors.pop(f"{stem}.{part}.{suffix}") for part in parts]
                tensors[f"model.layers.{layer}.{fused}.{suffix}"] = pieces[0] if along < 0 else torch.cat(pieces, along)
    return tensors


@pytest.mark.parametrize(
    ("case", "axis"),
    [
        ("fp8-channel", {"weight": 0, "weight_scale": 0}),
        ("fp8-block", {"weight": 0, "weight_scale_inv": 0}),
        ("gptq-4-asym", {"qweight": 1, "qzeros": 1, "scales": 1, "g_idx": -1}),
        ("awq", {"qweight": 1, "qzeros": 1, "scales": 1}),
    ],
)
def test_projections_fused_on_disk(tmp_path, case, axis):
    pack, section = CASES[case]
    tensors, meant = packers.quantized(pack)
    model = load(packers.write(tmp_path, joined(tensors, axis), section)).model
    found = loaded_weights(model)
    for name in packers.linears():
        torch.testing.assert_close(found[name], meant[f"{name}.weight"], rtol=1e-6, atol=1e-6)


def test_one_scale_for_projections_fused_on_disk(tmp_path):
    """As Phi-3's writers do: one scale for q, k and v together, one for their input."""
    pack, section = CASES["autofp8-static"]
    tensors, _ = packers.quantized(pack)
    fused = joined(tensors, {"weight": 0, "weight_scale": -1, "input_scale": -1})
    found = loaded_weights(load(packers.write(tmp_path, fused, section)).model)
    name = "model.layers.1.self_attn"
    expected = tensors[f"{name}.v_proj.weight"].float() * tensors[f"{name}.q_proj.weight_scale"]
    torch.testing.assert_close(found[f"{name}.v_proj"], expected)


@pytest.mark.parametrize(("block", "scale", "suffix"), [(32, "weight_scale_inv", "scale_inv"), (None, "weight_scale", "scale")])
def test_experts_fused_on_disk(tmp_path, block, scale, suffix):
    section = FP8 | ({"weight_block_size": [block, block]} if block else {})
    tensors, meant = packers.quantized(packers.float8(block=block, channel=True), mixture=True)
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for kind, ending in (("weight", ""), (scale, f"_{suffix}")):
            take = [{part: tensors.pop(f"{stem}.{e}.{part}_proj.{kind}") for part in ("gate", "up", "down")} for e in range(4)]
            tensors[f"{stem}.gate_up_proj{ending}"] = torch.stack([torch.cat((t["gate"], t["up"])) for t in take])
            tensors[f"{stem}.down_proj{ending}"] = torch.stack([t["down"] for t in take])
    found = loaded_weights(load(packers.write(tmp_path, tensors, section, mixture=True)).model)
    for name in packers.linears(mixture=True):
        torch.testing.assert_close(found[name], meant[f"{name}.weight"], rtol=1e-6, atol=1e-6, msg=name)


def test_experts_that_no_token_reached(tmp_path):
    """AutoFP8 gives them the range [-16, 16]; an expert of zeros gets the least scale there is. Neither is an error."""
    pack, section = CASES["autofp8-static"]
    tensors, _ = packers.quantized(pack, mixture=True)
    for layer in range(2):
        for part in ("gate", "up", "down"):
            stem = f"model.layers.{layer}.mlp.experts.2.{part}_proj"
            tensors[f"{stem}.input_scale"] = torch.tensor(16 / 448)
            tensors[f"{stem}.weight"] = torch.zeros_like(tensors[f"{stem}.weight"])
            tensors[f"{stem}.weight_scale"] = torch.tensor(1e-12 / 448)
    loaded = load(packers.write(tmp_path, tensors, section, mixture=True))
    assert not loaded_weights(loaded.model)["model.layers.0.mlp.experts.2.up_proj"].any()
    assert dense_logits(loaded.model, TOKENS).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_at_the_ends_of_their_range(tmp_path, bits):
    """Version 1 of GPTQ's files stores a zero point less one: 0 wraps round to all ones, and back."""
    pack = packers.gptq(bits=bits, sym=False)
    tensors, meant = packers.quantized(lambda name, weight: pack(name, weight.abs() if "q_proj" in name else -weight.abs()))
    assert (tensors["model.layers.0.self_attn.q_proj.qzeros"] == -1).all()
    section = CASES["gptq-4-asym"][1] | {"bits": bits}
    found = loaded_weights(load(packers.write(tmp_path, tensors, section)).model)
    for name in packers.linears():
        torch.testing.assert_close(found[name], meant[f"{name}.weight"], rtol=1e-6, atol=1e-6, msg=name)


def fnuz(name, weight):
    scale = (weight.abs().max() / 240).float()
    codes = (weight / scale).clamp(-240, 240).to(torch.float8_e4m3fnuz)
    byte = codes.view(torch.uint8).int()  # by the definition: bias 8, no infinities, 0x80 is NaN
    exponent, mantissa = byte >> 3 & 15, byte & 7
    value = torch.where(exponent == 0, mantissa / 8 * 2.0**-7, (1 + mantissa / 8) * 2.0 ** (exponent.double() - 8))
    return {"weight": codes, "weight_scale": scale}, (value * torch.where(byte > 127, -1, 1) * scale.double()).numpy()


def test_float8_of_other_hardware(tmp_path):
    """The same byte means half of what e4m3fn means; the largest would be NaN there, and what is NaN here is -0 there."""
    tensors, meant = packers.quantized(fnuz)
    assert any((tensor.view(torch.uint8) == 0x7F).any() for tensor in tensors.values() if tensor.dtype == torch.float8_e4m3fnuz)
    found = loaded_weights(load(packers.write(tmp_path / "q", tensors, FP8)).model)
    for name in packers.linears():
        torch.testing.assert_close(found[name], meant[f"{name}.weight"], rtol=1e-6, atol=1e-9)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name].view(torch.uint8)[3, 3] = 0x80
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN"):
        load(packers.write(tmp_path / "nan", tensors, FP8))
