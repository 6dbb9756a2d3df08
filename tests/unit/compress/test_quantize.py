"""Quantized checkpoints of a trained model: each method does what it is for, what is written means what was meant, here and elsewhere."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from apportion import quantize
from apportion.assets import DEFAULT_MODEL
from apportion.cli.inspect import describe
from apportion.cli.main import main
from apportion.compress import quantize as stage
from apportion.compress.methods.gptq import gptq
from apportion.compress.methods.scaling import clipped, weighted_error
from apportion.compress.recipe import PRESETS, THEIR_PRESETS
from apportion.compress.statistics import InputStatistics
from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.reference.number_formats import dequantize
from apportion.kernels.reference.number_formats import quantize as nearest
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model
from apportion.processor.tokenizer import Tokenizer
from tests.unit.models.conftest import dense_logits
from tests.unit.quant import packers
from tests.unit.quant.test_checkpoints import TOKENS, load, loaded_weights

PASSAGE = (DEFAULT_MODEL.parent / "passage.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def passage():
    """(calibration texts, held-out token ids)"""
    ids = Tokenizer.from_folder(DEFAULT_MODEL).encode(PASSAGE[40000:])[:1024]
    return [PASSAGE[i : i + 1500] for i in range(0, 36000, 1500)], [ids[:512], ids[512:]]


def loss(folder, sequences) -> float:
    model = load_model(ModelConfig(model=str(folder), dtype="float32"), read_spec(folder), ReferenceOps()).model
    total = 0.0
    for ids in sequences:
        total += float(torch.nn.functional.cross_entropy(dense_logits(model, ids)[:-1], torch.tensor(ids[1:])))
    return total / len(sequences)


def test_gptq_and_awq_lose_less_than_rounding(tmp_path, passage):
    texts, held_out = passage
    original = loss(DEFAULT_MODEL, held_out)
    lost = {}
    for method in ("rtn", "gptq", "awq"):
        quantize(str(DEFAULT_MODEL), tmp_path / method, "int3_g64_zp", method, texts, num_samples=24, max_seq_len=256)
        lost[method] = loss(tmp_path / method, held_out) - original
    assert lost["gptq"] < 0.8 * lost["rtn"] and lost["awq"] < 0.9 * lost["rtn"], lost
    assert lost["rtn"] > 0.02, "the format costs nothing here, so that the test says nothing"


def test_gptq_beats_rounding_and_zeroes_no_channel():
    """On a correlated input: less is lost for it; silent channels are rounded to nearest; without data it is rounding."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(48, 64, generator=generator)
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    x[:, [7, 40]] = 0
    seen = InputStatistics(64, hessian=True)
    seen.add(x, torch.ones(400))
    hessian = seen.mean_hessian()
    for name in ("int4_g32", "int3_g32_zp", "int2_channel_zp", "e4m3_channel", "e4m3_b32x32", "int8_channel"):
        fmt = NumberFormat.parse(name)
        rounded, found = nearest(weight, fmt), gptq(weight, fmt, hessian)
        assert weighted_error(weight, dequantize(found), hessian) < 0.8 * weighted_error(weight, dequantize(rounded), hessian), name
        assert torch.equal(found.codes[:, [7, 40]], rounded.codes[:, [7, 40]])
    assert torch.equal(gptq(weight, fmt, None).codes, rounded.codes)


@pytest.mark.parametrize("name", ["int4_g32", "int3_g32_zp", "int2_channel_zp", "int4_g24"])
def test_clipping_is_for_what_a_group_adds_to_the_output(name):
    """Inputs of a common sign: errors of a group add up, which no channel's own variance tells. One group at a time, nothing is lost."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(48, 96, generator=generator)
    x = torch.randn(400, 96, generator=generator) + 3
    hessian = (x.T @ x / len(x)).double()
    fmt = NumberFormat.parse(name)
    near, width = dequantize(nearest(weight, fmt)), fmt.block[1] or 96
    found = {kind: dequantize(clipped(weight, fmt, h)) for kind, h in (("whole", hessian), ("diagonal", hessian.diagonal().diag()))}
    lost = {"nearest": 0.0, "whole": 0.0, "diagonal": 0.0}
    for first in range(0, 96, width):
        part = slice(first, first + width)
        for kind, w in [("nearest", near), *found.items()]:
            lost[kind] += weighted_error(weight[:, part], w[:, part], hessian[part, part])
    assert lost["whole"] < 0.9 * lost["nearest"] and lost["whole"] < lost["diagonal"], lost


def test_token_weights_and_few_tokens():
    """A token of weight 3 counts as three; of weight 0 not at all. A matrix that no token reached has the pool's statistics."""
    x = torch.randn(5, 8)
    weighted, repeated, pool, empty = (InputStatistics(8, hessian=True) for _ in range(4))
    weighted.add(x, torch.tensor([3.0, 1, 0, 1, 0]))
    repeated.add(x[[0, 0, 0, 1, 3]], torch.ones(5))
    torch.testing.assert_close(weighted.mean_hessian(), repeated.mean_hessian(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weighted.mean_abs, repeated.mean_abs, rtol=1e-6, atol=1e-6)  # sums in float32
    pool.add(x, torch.ones(5))
    assert torch.equal(empty.mean_hessian(pool), pool.mean_hessian())
    few = weighted.mean_hessian(pool)
    assert not torch.allclose(few, weighted.mean_hessian()) and not torch.allclose(few, pool.mean_hessian())


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize(
    ("scheme", "method", "form"),
    [
        ("fp8", "rtn", "compressed-tensors"), ("fp8_static", "rtn", "fp8"), ("fp8", "rtn", "fp8"), ("e4m3_b32x32@e4m3_g32", "rtn", "fp8"),
        ("int4_g32", "gptq", "compressed-tensors"), ("int3_g32_zp", "awq", "compressed-tensors"),
        ("w8a8", "smoothquant", "compressed-tensors"), ("int8_channel_zp", "gptq", "compressed-tensors"),
    ],
)  # fmt: skip
def test_what_is_written_loads(tmp_path, scheme, method, form, mixture):
    """The loaded model holds the numbers that the report speaks of; every other tensor is as it was."""
    tensors = packers.floats(mixture)
    source = packers.write(tmp_path / "source", dict(tensors), mixture=mixture)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 101, (48,), generator=generator).tolist() for _ in range(4)]
    report = quantize(str(source), tmp_path / "out", scheme, method, tokens, format=form, kv_cache=form == "fp8")
    assert {entry["name"] for entry in report["projections"]} == set(packers.linears(mixture))
    loaded = load(tmp_path / "out")
    found = loaded_weights(loaded.model)
    assert report["mean_relative_error"] < {"int3_g32_zp": 0.2, "int4_g32": 0.05}.get(scheme, 0.01)
    if method in ("rtn", "gptq"):
        for entry in report["projections"]:
            weight = tensors[f"{entry['name']}.weight"]
            lost = (weight - found[entry["name"]]).square().sum() / weight.square().sum()
            assert lost < 0.1
            if entry["measured_on"] == "weights":
                assert abs(float(lost) - entry["relative_error"]) < 1e-6
    assert loaded.model.layers[0].self_attn.attention.kv_scales.calibrated == (form == "fp8")
    if not mixture and "int3" not in scheme and "int4" not in scheme:  # a model of random weights has no room for fewer bits
        near = torch.nn.functional.cosine_similarity(dense_logits(loaded.model, TOKENS), dense_logits(load(source).model, TOKENS))
        assert near.mean() > 0.95
    rows = {row["projection"]: row for row in describe(str(tmp_path / "out"))["projections"]}
    assert all(rows[name]["bits"] < 14 for name in packers.linears(mixture))


SCHEMES = sorted({spelt.format(tag="_bf16") for spelt in (PRESETS | THEIR_PRESETS).values()})


@pytest.mark.parametrize(
    ("scheme", "family"), [(s, "compressed-tensors") for s in SCHEMES] + [(s, "fp8") for s in SCHEMES if s.startswith("e4m3")]
)
def test_files_have_the_bytes_that_were_predicted(tmp_path, scheme, family):
    """Of every scheme with a name: each projection's tensors, every other tensor, and the headers are all that there is."""
    source = packers.write(tmp_path / "source", packers.floats())
    tokens = [[(7 * i + 3 * j) % 101 for j in range(40)] for i in range(4)]
    report = quantize(str(source), tmp_path / "out", scheme, calibration=tokens, format=family)
    tensors, headers = {}, 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
        headers += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    total = headers
    for entry in report["projections"]:
        used, shape = Scheme.parse(entry["scheme"]), entry["shape"]
        own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{entry['name']}.")}
        beside = 16 * (f"{entry['name']}.weight_shape" in own)  # its two numbers, which no format counts
        beside += 4 * (used.activation is not None and used.activation.scale == "static")
        stored = used.weight.stored_bytes(*shape)
        assert sum(tensor.nbytes for tensor in own.values()) == stored + beside, entry["name"]
        assert entry["bytes"] == stored
        total += stored + beside
    kept = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if name in tensors}
    assert kept.keys() == tensors.keys() and all(torch.equal(kept[name], tensors[name]) for name in kept)
    assert report["file_bytes"] == total + sum(tensor.nbytes for tensor in kept.values())


@pytest.mark.parametrize(
    "scheme", ["fp8", "int4_g32", "w8a16", "int8_channel_zp", "w8a8", "fp8_static", "int4_g32_zp", "int3_g32", "int2_g32_zp", "int6_g32"]
)
def test_transformers_reads_the_same_numbers(tmp_path, scheme):
    """With the package compressed-tensors, equal to 1e-3. Packed zero points it reads only where it widens weights as they are loaded."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = packers.write(tmp_path / "source", packers.floats(), model_type="llama")
    quantize(str(source), tmp_path / "out", scheme, calibration=[TOKENS])
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if scheme.endswith("g32_zp") else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **how)
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    found = dense_logits(load(tmp_path / "out").model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", ["e4m3_channel", "int4_g32"])
def test_transformers_reads_a_mixtral(tmp_path, scheme):
    """The same for experts, which transformers widens as it loads them, each found by its published name."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    quantize(str(packers.write_mixtral(tmp_path / "source")), tmp_path / "out", scheme)
    widened = transformers.CompressedTensorsConfig(dequantize=True)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=widened, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    found = dense_logits(load(tmp_path / "out").model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    source = packers.write(tmp_path / "source", packers.floats())
    tokens = [[(7 * i + 3 * j) % 101 for j in range(40)] for i in range(4)]
    quantize(str(source), tmp_path / "whole", "int4_g32", "gptq", tokens)
    original = stage._Layer.quantize

    def break_off(self, walk):
        if any(".1." in name for name in self._tasks):
            raise KeyboardInterrupt
        original(self, walk)

    monkeypatch.setattr(stage._Layer, "quantize", break_off)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(source), tmp_path / "parts", "int4_g32", "gptq", tokens)
    monkeypatch.setattr(stage._Layer, "quantize", original)
    with pytest.raises(InvalidParameter, match="is not empty"):
        quantize(str(source), tmp_path / "parts", "int4_g32", "rtn")
    quantize(str(source), tmp_path / "parts", "int4_g32", "gptq", tokens)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "fp9"}, "'fp9' is not the name of a number format"),
        ({"method": "gptq"}, "needs calibration text"),
        ({"scheme": "fp8_static"}, "needs calibration text"),
        ({"scheme": "w4a16", "method": "smoothquant"}, "which int4_g128 does not round"),
        ({"format": "gguf"}, "unknown format 'gguf'"),
        ({"calibration": [[1, 2, 3]], "token_weights": [[1.0]]}, "one number for each calibration token"),
        ({"calibration": "/nowhere.txt"}, "/nowhere.txt cannot be read"),
    ],
)
def test_refusals(tmp_path, options, said):
    source = packers.write(tmp_path / "source", packers.floats())
    with pytest.raises(InvalidParameter, match=said):
        quantize(str(source), tmp_path / "out", **options)


def test_verbs(tmp_path, capsys):
    source = packers.write(tmp_path / "source", packers.floats())
    out = tmp_path / "out"
    assert main(["quantize", str(source), "-o", str(out), "--scheme", "w4a16", "--ignore", "lm_head", "--ignore", "re:.*down_proj"]) == 0
    assert "12 projections in int4_g128" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    rows = {row["projection"]: row for row in json.loads(capsys.readouterr().out)["projections"]}
    assert rows["model.layers.0.mlp.up_proj"]["scheme"] == "int4_g128" and rows["model.layers.0.mlp.up_proj"]["bits"] < 5.5
    assert rows["model.layers.0.mlp.down_proj"]["scheme"] == "float32"
    assert main(["inspect", str(out)]) == 0
    assert "model.layers.1.self_attn.k_proj" in capsys.readouterr().out
    assert main(["quantize", str(out), "-o", str(tmp_path / "again")]) == 2
    assert "is quantized already" in capsys.readouterr().err
