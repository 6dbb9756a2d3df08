"""Recipes: llm-compressor's files are read as it means them, and what a recipe asks for is what a checkpoint then holds."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from apportion import quantize
from apportion.assets import PASSAGE
from apportion.cli.inspect import describe
from apportion.cli.main import main
from apportion.compress.recipe import PRESETS, THEIR_PRESETS, Recipe, read_recipe
from apportion.core.errors import ApportionError, InvalidParameter
from tests.unit.quant import packers

TOKENS = [[(7 * i + 3 * j) % 101 for j in range(40)] for i in range(4)]
STAGES = """
smooth_stage:
  run_type: oneshot
  smooth_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
round_stage:
  round_modifiers:
    GPTQModifier:
      ignore: [lm_head, "re:.*down_proj"]
      targets: Linear
      scheme: W8A8
      dampening_frac: 0.05
    QuantizationModifier:
      targets: ["re:.*down_proj"]
      scheme: FP8_DYNAMIC
"""
GROUPS = """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      ignore: ["lm_head"]
      config_groups:
        all:
          targets: ["Linear"]
          weights: {num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 32}
        attention:
          targets: ["re:.*self_attn.*"]
          weights: {num_bits: 8, type: float, symmetric: true, strategy: tensor}
          input_activations: {num_bits: 8, type: float, symmetric: true, strategy: tensor, dynamic: false}
      kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, dynamic: false, symmetric: true}
"""


def written(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def stored_as(folder):
    return {row["projection"]: row["scheme"] for row in describe(str(folder))["projections"]}


def test_stages_in_order(tmp_path):
    """SmoothQuant, then GPTQ to int8, and float8 for one kind of projection."""
    source = packers.write(tmp_path / "source", packers.floats())
    recipe = read_recipe(written(tmp_path, STAGES))
    assert recipe.method == "smoothquant+rtn+gptq" and recipe.strength == 0.8 and recipe.steps[1].damping == 0.05
    report = quantize(str(source), tmp_path / "out", calibration=TOKENS, recipe=tmp_path / "recipe.yaml")
    assert report["scheme"] == "e4m3_channel@e4m3_token + int8_channel@int8_token"
    for name, scheme in stored_as(tmp_path / "out").items():
        if name in packers.linears():
            assert scheme == ("e4m3_channel@e4m3_token" if "down" in name else "int8_channel@int8_token"), name


def test_groups_and_the_cache(tmp_path):
    """Groups with names of their own come before the one for all; scales of the cache are calibrated and the cache is used."""
    from apportion.core.config import ModelConfig
    from apportion.engine.build import read_model

    source = packers.write(tmp_path / "source", packers.floats())
    quantize(str(source), tmp_path / "out", calibration=TOKENS, recipe=written(tmp_path, GROUPS))
    for name, scheme in stored_as(tmp_path / "out").items():
        if name in packers.linears():
            assert scheme == ("e4m3_channel@e4m3_static" if "self_attn" in name else "int4_g32_zp"), name
    assert read_model(ModelConfig(model=str(tmp_path / "out")))[1].kv_cache_dtype == "fp8_e4m3"
    assert read_model(ModelConfig(model=str(source)))[1].kv_cache_dtype is None


def test_presets_are_llm_compressors():
    """By the package that defines them."""
    presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    from apportion.compress.recipe import _scheme
    from apportion.quant.section import Section

    checked = 0
    for name, meant in THEIR_PRESETS.items():
        parts = [
            part and Section(json.loads(part.model_dump_json()), name) for part in map(presets[name].get, ("weights", "input_activations"))
        ]
        assert _scheme(parts[0], parts[1] or None).replace("{tag}", "") == meant.replace("{tag}", ""), name
        checked += 1
    assert checked >= 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must be an object"),
        ("quant_stage: {quant_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}", "SparseGPTModifier is no modifier that is known"),
        ("QuantizationModifier: {scheme: NVFP4}", "scheme is 'NVFP4'; known: FP8"),
        ("QuantizationModifier: {scheme: FP8, sparsity: 0.5}", r"QuantizationModifier.sparsity = 0.5 is not understood"),
        ("GPTQModifier: {scheme: W4A16, block_size: 64}", "block_size is 64; known: 128"),
        ("GPTQModifier: {scheme: W4A16, dampening_frac: 2}", "it is a number from 0 to 1"),
        ("AWQModifier: {scheme: W4A16, duo_scaling: true}", "duo_scaling is True; known: False"),
        ("SmoothQuantModifier: {smoothing_strength: 0.5}", "quantizes nothing"),
        ("QuantizationModifier: {scheme: W8A8}\nSmoothQuantModifier: {}", "before any other rounds"),
        ("QuantizationModifier: {config_groups: {g: {weights: {num_bits: 4, observer: mse}}}}", "observer is 'mse'"),
        ("GPTQModifier: {config_groups: {g: {weights: {num_bits: 4, group_size: 32, actorder: group}}}}", "actorder is 'group'"),
        ("QuantizationModifier: {config_groups: {g: {input_activations: {num_bits: 8}}}}", "activations alone cannot be quantized"),
        ("a: [", "cannot be read: while parsing"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(tmp_path, text, said):
    with pytest.raises(ApportionError, match=said):
        read_recipe(written(tmp_path, text))


def test_names_that_nothing_has_are_refused(tmp_path):
    source = packers.write(tmp_path / "source", packers.floats())
    with pytest.raises(InvalidParameter, match=r"names 're:.\*w1', and no linear"):
        quantize(str(source), tmp_path / "out", ignore=["re:.*w1"])
    with pytest.raises(InvalidParameter, match="a recipe says scheme"):
        quantize(str(source), tmp_path / "out", "fp8", recipe=Recipe.of("fp8"))
    assert not (tmp_path / "out").exists()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def test_the_page_shows_the_report(tmp_path, capsys):
    """Every projection is a point, the loss stands there with its interval, and the page asks nothing of the network."""
    from apportion.assets import DEFAULT_MODEL

    text, held_out = tmp_path / "text.txt", tmp_path / "held_out.txt"
    text.write_text(PASSAGE.read_text("utf-8")[:4000])
    held_out.write_text(PASSAGE.read_text("utf-8")[40000:48000])
    command = [
        "quantize",
        str(DEFAULT_MODEL),
        "-o",
        str(tmp_path / "out"),
        "--scheme",
        PRESETS["w2a16"].format(tag=""),
        "--evaluate",
        str(held_out),
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "s left" in said.err and "loss against the original: " in said.out
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["evaluation"]["format"] == "apportion-report" and report["evaluation"]["metrics"]["nll_difference"]["value"] > 0.1
    page = Page((tmp_path / "out" / "quantization_report.html").read_text("utf-8"))
    assert sum(tag == "circle" for tag, _ in page.tags) == len(report["projections"])
    assert f"{report['evaluation']['metrics']['nll_difference']['value']:.3g}" in page.words
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]


def test_projections_go_by_their_published_names_too(tmp_path):
    """As recipes for Mixtral are written: by the names of the files, which are not those of the family's other models."""
    source = packers.write_mixtral(tmp_path / "source")
    ignored = '["lm_head", "re:.*block_sparse_moe.gate", "re:.*experts.0.w2", "model.layers.1.mlp.experts.3.up_proj"]'
    recipe = written(tmp_path, f"q_stage: {{q_modifiers: {{QuantizationModifier: {{ignore: {ignored}, scheme: FP8_DYNAMIC}}}}}}")
    quantize(str(source), tmp_path / "out", recipe=recipe)
    float_ones = {name for name, scheme in stored_as(tmp_path / "out").items() if scheme == "float32" and ".experts." in name}
    assert float_ones == {*(f"model.layers.{i}.mlp.experts.0.down_proj" for i in range(2)), "model.layers.1.mlp.experts.3.up_proj"}
