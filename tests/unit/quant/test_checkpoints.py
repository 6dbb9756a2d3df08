"""Every family of quantized checkpoint: the numbers that are loaded are those the file means, and the model computes with them."""

from __future__ import annotations

import pytest
import torch

from apportion.core.config import ModelConfig
from apportion.core.errors import CheckpointError, Unsupported
from apportion.kernels.reference.ops import ReferenceOps
from apportion.layers.linear import GatedLinear, JoinedLinear, Linear
from apportion.layers.moe import Experts
from apportion.models.checkpoint import read_spec
from apportion.models.loader import attach_model, load_model
from tests.unit.models.conftest import dense_logits
from tests.unit.quant import packers

TOKENS = [3, 1, 4, 1, 5, 92, 6, 55]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}


def compressed(weights: dict, form: str, inputs: dict | None = None, **more) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
        "global_compression_ratio": None, "kv_cache_scheme": None, "config_groups": {"group_0": group},
    } | more  # fmt: skip


def gptq_case(**changes):
    section = GPTQ | {key: value for key, value in changes.items() if key != "v2"}
    if changes.get("v2"):
        section["checkpoint_format"] = "gptq_v2"
    return packers.gptq(**changes), section


def packed_case(num_bits, inputs=None, dtype=torch.float32, **weights):
    args = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    return packers.compressed(args, "pack-quantized", scale_dtype=dtype), compressed(args, "pack-quantized", inputs)


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
INT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
ASYM = INT | {"symmetric": False}
TOKEN = {"num_bits": 8, "dynamic": True, "strategy": "token"}
STATIC = {"num_bits": 8, "dynamic": False, "strategy": "tensor"}
CASES = {
    "autofp8-dynamic": (packers.float8(), FP8),
    "autofp8-static": (packers.float8(static=True), FP8 | {"activation_scheme": "static"}),
    "fp8-channel": (packers.float8(channel=True), FP8),
    "fp8-block": (packers.float8(block=32), FP8 | {"weight_block_size": [32, 32], "fmt": "e4m3"}),
    "fp8-block-odd": (packers.float8(block=48), FP8 | {"weight_block_size": [48, 48]}),
    "gptq-4": gptq_case(),
    "gptq-4-asym": gptq_case(sym=False),
    "gptq-4-v2": gptq_case(sym=False, v2=True),
    "gptq-4-sym-v2": gptq_case(v2=True),
    "gptq-4-act-order": gptq_case(sym=False, desc_act=True),
    "gptq-4-channel": gptq_case(group_size=-1, desc_act=True),
    "gptq-3": gptq_case(bits=3, sym=False),
    "gptq-3-act-order": gptq_case(bits=3, desc_act=True),
    "gptq-2": gptq_case(bits=2, sym=False),
    "gptq-8": gptq_case(bits=8, sym=False, desc_act=True),
    "awq": (packers.awq(), AWQ),
    "ct-fp8-tensor-static": (
        packers.compressed(FLOAT | {"strategy": "tensor"}, "float-quantized", static=True),
        compressed(FLOAT | {"strategy": "tensor"}, "float-quantized", STATIC | {"type": "float"}),
    ),
    "ct-fp8-channel": (packers.compressed(FLOAT, "float-quantized"), compressed(FLOAT, "float-quantized", TOKEN | {"type": "float"})),
    "ct-fp8-block": (
        packers.compressed(FLOAT | {"strategy": "block", "block_structure": [32, 32]}, "float-quantized"),
        compressed(FLOAT | {"strategy": "block", "block_structure": [32, 32]}, "float-quantized",
                   {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "group", "group_size": 32}),
    ),
    "ct-int8": (packers.compressed(INT, "int-quantized"), compressed(INT, "int-quantized", TOKEN)),
    "ct-int8-asym": (packers.compressed(ASYM, "int-quantized"), compressed(ASYM, "int-quantized")),
    "ct-int8-bf16": (packers.compressed(INT, "int-quantized", scale_dtype=torch.bfloat16), compressed(INT, "int-quantized", TOKEN)),
    **{f"ct-w{bits}a16": packed_case(bits) for bits in (2, 3, 4, 8)},
    **{f"ct-w{bits}a16-asym": packed_case(bits, symmetric=False) for bits in (2, 3, 4, 8)},
    "ct-w4a16-channel": packed_case(4, strategy="channel", group_size=None),
    "ct-w4a16-bf16-scales": packed_case(4, dtype=torch.bfloat16),
    "ct-w4a8": packed_case(4, TOKEN | {"type": "int"}),
}  # fmt: skip


def load(folder, **changes):
    return load_model(ModelConfig(model=str(folder), **changes), read_spec(folder), ReferenceOps())


def loaded_weights(model) -> dict[str, torch.Tensor]:
    """Every linear as the operators hold it, by the checkpoint's names."""
    found = {}
    for module in model.modules():
        if isinstance(module, Linear):
            op = module.op.ungated if isinstance(module.op, GatedLinear) else module.op
            parts = op.parts if isinstance(op, JoinedLinear) else [op]
            dense = torch.cat([part.rows(torch.arange(part.spec.out_features, dtype=torch.int32)) for part in parts])
            names, counts = zip(*((name, rows.count) for name, rows in module.projections), strict=True)
            found |= dict(zip(names, dense.split(counts), strict=True))
        if isinstance(module, Experts):
            for expert, linears in enumerate(module.op._linears):
                for projection, op in linears.items():
                    ids = torch.arange(op.spec.out_features, dtype=torch.int32)
                    found[f"{module.name}.{expert}.{projection}_proj"] = op.rows(ids)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
def test_numbers_are_those_of_the_file(tmp_path, case, mixture):
    pack, section = CASES[case]
    tensors, meant = packers.quantized(pack, mixture)
    loaded = load(packers.write(tmp_path, tensors, section, mixture))
    found = loaded_weights(loaded.model)
    for name in packers.linears(mixture):
        expected = meant[f"{name}.weight"]
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6, msg=name)
    attached = attach_model(loaded.manifest, loaded.arena, ReferenceOps())
    assert torch.equal(dense_logits(attached.model, TOKENS), dense_logits(loaded.model, TOKENS))


@pytest.mark.parametrize(
    "case", ["autofp8-dynamic", "fp8-block", *(name for name in CASES if name.startswith(("gptq", "awq", "ct-w")) and name != "ct-w4a8")]
)
@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
def test_logits_are_those_of_the_meant_numbers(tmp_path, case, mixture):
    """Weight-only formats: to rounding. Where inputs are rounded, near."""
    pack, section = CASES[case]
    tensors, meant = packers.quantized(pack, mixture)
    quantized = dense_logits(load(packers.write(tmp_path / "q", tensors, section, mixture)).model, TOKENS)
    plain = dense_logits(load(packers.write(tmp_path / "f", meant, None, mixture)).model, TOKENS)
    if section["quant_method"] != "fp8":
        torch.testing.assert_close(quantized, plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(quantized.argmax(-1), plain.argmax(-1))
    else:
        assert torch.nn.functional.cosine_similarity(quantized, plain).mean() > 0.98  # one token may go to another expert


def test_unequal_projections_stand_beside_each_other(tmp_path):
    """Static input scales of q, k and v are each its own; weights of merged projections keep their own scales."""
    pack, section = CASES["autofp8-static"]
    tensors, _ = packers.quantized(pack)
    scale = "model.layers.0.self_attn.k_proj.weight_scale"
    tensors[scale] = tensors[scale] * 7
    model = load(packers.write(tmp_path, tensors, section)).model
    qkv = model.layers[0].self_attn.qkv_proj
    inputs = [part._stored["input_scale"].item() for part in qkv.op.parts]
    assert inputs == [tensors[f"model.layers.0.self_attn.{p}.input_scale"].item() for p in ("q_proj", "k_proj", "v_proj")]
    expected = tensors["model.layers.0.self_attn.k_proj.weight"].float() * tensors[scale]
    torch.testing.assert_close(loaded_weights(model)["model.layers.0.self_attn.k_proj"], expected)


def test_formats_may_differ_anywhere(tmp_path):
    """Several groups: by name, by expression, by class; k_proj alone in another format, one layer left alone."""
    four, four_section = packed_case(4)
    eight, eight_section = packed_case(8, strategy="channel", group_size=None)
    three, three_section = packed_case(3)

    def pack(name, weight):
        if "layers.1.mlp.down_proj" in name:
            return {"weight": weight}, weight.numpy()
        if name.endswith("k_proj"):
            return eight(name, weight)
        return (three if "mlp" in name else four)(name, weight)

    groups = {
        "a": eight_section["config_groups"]["group_0"] | {"targets": ["re:.*k_proj$"]},
        "b": three_section["config_groups"]["group_0"] | {"targets": ["re:.*mlp.*"]},
        "c": four_section["config_groups"]["group_0"],
    }
    section = four_section | {"config_groups": groups, "ignore": ["lm_head", "model.layers.1.mlp.down_proj"]}
    tensors, meant = packers.quantized(pack)
    loaded = load(packers.write(tmp_path / "q", tensors, section))
    schemes = [spec["scheme"] for spec in loaded.model.layers[0].self_attn.qkv_proj.describe()["linears"]]
    assert schemes == ["int4_g32", "int8_channel", "int4_g32"]
    for name, found in loaded_weights(loaded.model).items():
        if name in packers.linears():
            torch.testing.assert_close(found, meant[f"{name}.weight"], rtol=1e-6, atol=1e-6)
    plain = load(packers.write(tmp_path / "f", meant))
    torch.testing.assert_close(dense_logits(loaded.model, TOKENS), dense_logits(plain.model, TOKENS), rtol=1e-4, atol=1e-4)


def test_biases_of_zeros_are_nothing(tmp_path):
    pack, section = CASES["gptq-4"]
    tensors, _ = packers.quantized(pack)
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64, dtype=torch.float16)
    load(packers.write(tmp_path / "zeros", tensors, section))
    tensors["model.layers.0.self_attn.o_proj.bias"][5] = 1
    with pytest.raises(CheckpointError, match=r"does not use: model.layers.0.self_attn.o_proj.bias"):
        load(packers.write(tmp_path / "ones", tensors, section))


def test_gptq_overrides(tmp_path):
    """GPTQModel's `dynamic`: +: changes settings, -: leaves a projection alone."""
    four, two = packers.gptq(), packers.gptq(bits=2, sym=False)

    def pack(name, weight):
        if "down_proj" in name:
            return {"weight": weight}, weight.numpy()
        return (two if "up_proj" in name else four)(name, weight)

    tensors, meant = packers.quantized(pack)
    section = GPTQ | {"dynamic": {"-:.*down_proj": {}, r"+:.*\.up_proj": {"bits": 2, "sym": False}}}
    found = loaded_weights(load(packers.write(tmp_path, tensors, section)).model)
    for name in packers.linears():
        torch.testing.assert_close(found[name], meant[f"{name}.weight"], rtol=1e-6, atol=1e-6)


def change(name, value):
    def damage(tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return damage


def drop(name):
    return lambda tensors: tensors.pop(name)


Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("case", "damage", "said"),
    [
        ("autofp8-dynamic", drop(f"{Q}.weight_scale"), rf"lacks {Q}.weight_scale"),
        ("autofp8-static", drop(f"{Q}.input_scale"), rf"lacks {Q}.input_scale"),
        ("autofp8-dynamic", change(f"{Q}.weight_scale", torch.tensor(0.0)), rf"{Q}.weight_scale holds a scale that is zero or negative"),
        ("autofp8-dynamic", change(f"{Q}.weight_scale", torch.tensor(-448.0)), "zero or negative"),
        ("autofp8-dynamic", change(f"{Q}.weight_scale", torch.tensor(float("inf"))), rf"{Q}.weight_scale holds a scale that is NaN or inf"),
        ("autofp8-static", change(f"{Q}.input_scale", torch.tensor(float("nan"))), rf"{Q}.input_scale holds a scale that is NaN"),
        ("autofp8-dynamic", change(f"{Q}.weight", lambda w: w.view(torch.uint8).fill_(0xFF).view(w.dtype)), rf"{Q}.weight holds NaN"),
        ("autofp8-dynamic", change(f"{Q}.weight", lambda w: w.to(torch.float8_e5m2)), rf"{Q}.weight is float8_e5m2 and must be"),
        ("autofp8-dynamic", change(f"{Q}.weight", lambda w: w.float()), rf"{Q}.weight is float32 and must be float8_e4m3fn"),
        ("autofp8-dynamic", change(f"{Q}.weight_scale", torch.ones(3)), rf"{Q}.weight_scale must have shape \[\] or \[1\] or .* has \[3\]"),
        ("autofp8-dynamic", change(f"{Q}.input_scale", torch.ones(1)), rf"does not use: {Q}.input_scale"),
        ("fp8-block", change(f"{Q}.weight_scale_inv", torch.ones(2, 1)), rf"{Q}.weight_scale_inv must have shape \[2, 2\]"),
        ("gptq-4", drop(f"{Q}.scales"), rf"lacks {Q}.scales"),
        ("gptq-4", change(f"{Q}.scales", lambda s: s * 0), rf"{Q}.scales holds a scale that is zero"),
        ("gptq-4", change(f"{Q}.qzeros", lambda z: z + 1), rf"{Q}.qzeros holds zero points, though the config says 'sym': true"),
        ("gptq-4", change(f"{Q}.g_idx", lambda g: g.flip(0)), rf"{Q}.g_idx reorders inputs, though the config says 'desc_act': false"),
        ("gptq-4-act-order", change(f"{Q}.g_idx", lambda g: g * 0), rf"{Q}.g_idx does not give each group 32 inputs"),
        ("gptq-4-act-order", drop(f"{Q}.g_idx"), rf"lacks {Q}.g_idx"),
        ("gptq-4", change(f"{Q}.qweight", lambda q: q[:4]), rf"{Q}.qweight must have shape \[8, 64\]"),
        ("gptq-4", change(f"{Q}.qweight", lambda q: q.float()), rf"{Q}.qweight is float32 and must be int32"),
        ("awq", change(f"{DOWN}.scales", lambda s: s / 0), rf"{DOWN}.scales holds a scale that is NaN or infinite"),
        ("awq", drop(f"{DOWN}.qzeros"), rf"lacks {DOWN}.qzeros"),
        ("ct-w4a16", change(f"{DOWN}.weight_shape", torch.tensor([96, 64])), r"weight_shape says \[96, 64\], and the matrix is \[64, 96\]"),
        ("ct-w4a16-asym", drop(f"{DOWN}.weight_zero_point"), rf"lacks {DOWN}.weight_zero_point"),
        ("fp8-block", drop(f"{Q}.weight_scale_inv"), rf"lacks {Q}.weight_scale_inv"),
        ("fp8-block", change(f"{Q}.weight_scale_inv", lambda s: s * 0), rf"{Q}.weight_scale_inv holds a scale that is zero"),
        ("gptq-4", change(f"{Q}.scales", lambda s: s * float("nan")), rf"{Q}.scales holds a scale that is NaN"),
        ("awq", change(f"{Q}.scales", lambda s: s * 0), rf"{Q}.scales holds a scale that is zero"),
        ("awq", change(f"{Q}.qweight", lambda q: q[:, :4]), rf"{Q}.qweight must have shape \[64, 8\]"),
        ("ct-w4a16", drop(f"{DOWN}.weight_scale"), rf"lacks {DOWN}.weight_scale"),
        ("ct-w4a16", drop(f"{DOWN}.weight_packed"), rf"lacks {DOWN}.weight_packed"),
        ("ct-w4a16", change(f"{DOWN}.weight_scale", lambda s: s * float("nan")), rf"{DOWN}.weight_scale holds a scale that is NaN"),
        ("ct-w4a16", change(f"{DOWN}.weight_scale", lambda s: s[:, :1]), rf"{DOWN}.weight_scale must have shape \[64, 3\]"),
        ("ct-int8", change(f"{DOWN}.weight_scale", lambda s: s * 0), rf"{DOWN}.weight_scale holds a scale that is zero"),
        ("ct-int8", change(f"{DOWN}.weight", lambda w: w.float()), rf"{DOWN}.weight is float32 and must be int8"),
        ("ct-int8", change(f"{DOWN}.weight_zero_point", torch.ones(64, 1, dtype=torch.int8)), "zero_point is not zero, though"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(tmp_path, case, damage, said):
    pack, section = CASES[case]
    tensors, _ = packers.quantized(pack)
    damage(tensors)
    with pytest.raises(CheckpointError, match=said):
        load(packers.write(tmp_path, tensors, section))


def group(**changes):
    base = compressed(INT, "int-quantized", TOKEN)
    first = base["config_groups"]["group_0"]
    for key, value in changes.items():
        part, _, field = key.partition("__")
        first[part] = first[part] | {field: value} if field else value
    return base


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes' cannot be read; known: awq, compressed-tensors, fp8, gptq"),
        ({"bits": 4}, "quantized by None cannot be read"),
        (GPTQ | {"bits": 5}, r"quantization_config.bits is 5; known: 2, 3, 4, 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"rotation": "hadamard"}, r"quantization_config.rotation = 'hadamard' is not understood"),
        (GPTQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"sym": 1}, "sym must be true or false, not 1"),
        (GPTQ | {"dynamic": {"+:.*": {"adapter": "x"}}}, "adapter = 'x' is not understood"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; known: 'gemm'"),
        (AWQ | {"bits": 3}, "bits is 3; known: 4"),
        (AWQ | {"zero_point": False}, "zero_point is false"),
        (FP8 | {"activation_scheme": "token"}, "activation_scheme is 'token'; known: 'static', 'dynamic'"),
        (FP8 | {"weight_block_size": 128}, "weight_block_size is 128"),
        (FP8 | {"weight_block_size": [128, 128], "activation_scheme": "static"}, "with weight_block_size only 'dynamic'"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        (FP8 | {"ignored_layers": "lm_head"}, "ignored_layers must be a list of names"),
        (FP8 | {"ignored_layers": ["re:(("]}, "is no regular expression"),
        (compressed(INT, "marlin-24"), "format is 'marlin-24'"),
        (compressed(INT, "int-quantized", sparsity_config={"format": "sparse"}), "sparsity_config = .* is not understood"),
        (compressed(INT, "int-quantized", transform_config={"a": 1}), "transform_config = .* is not understood"),
        (group(weights__dynamic=True), r"config_groups.group_0.weights.dynamic is True"),
        (group(weights__strategy="tensor_group"), r"group_0.weights.strategy is 'tensor_group'"),
        (group(weights__num_bits=4, weights__type="float"), r"weights.num_bits is 4; known: 8"),
        (group(input_activations__symmetric=False), r"input_activations.symmetric is false"),
        (group(input_activations__dynamic="local"), r"input_activations.dynamic is 'local'"),
        (group(output_activations={"num_bits": 8}), r"output_activations = .* is not understood"),
        (group(weights=None), r"group_0.weights is null"),
        (group(weights__wobble=3), r"weights.wobble = 3 is not understood"),
    ],
)  # fmt: skip
def test_configs_that_are_not_understood_name_the_key(tmp_path, section, said):
    with pytest.raises((Unsupported, CheckpointError), match=said):
        load(packers.write(tmp_path, packers.floats(), section))
