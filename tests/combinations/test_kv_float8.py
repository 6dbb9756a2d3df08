"""A cache of float8 numbers keeps every promise that a cache of wider ones keeps: the same tokens, bit by bit, however the work is cut.

What a number is rounded to depends on it and its layer's scales alone, so nothing of the batch can enter.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from apportion.core.config import LaneConfig
from apportion.engine import scheduler
from apportion.models.checkpoint import read_spec

from .harness import DECODE, PREFILL, Setup, generate, running
from .test_engine_equalities import INVARIANT, PARAMS, PROMPTS, RANDOM, check, check_twins

CASES = {"latent": "fp8_e4m3", "windows": "fp8_e5m2", "stories260K": "fp8"}


def scaled_copy(source, folder):
    """The model with calibrated scales: of keys one for each head, of values one; the first layer spells them otherwise."""
    shutil.copytree(source, folder)
    spec, extra = read_spec(source), {}
    for layer in range(spec.num_layers):
        stem = f"model.layers.{layer}.self_attn"
        k, v = torch.linspace(0.05, 0.2, spec.num_kv_heads), torch.tensor([0.05])
        extra |= {f"{stem}.k_proj.k_scale": k, f"{stem}.v_proj.v_scale": v} if layer == 0 else {f"{stem}.k_scale": k, f"{stem}.v_scale": v}
    weights = load_file(folder / "model.safetensors")
    save_file(weights | extra, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=CASES)
def plain(request, shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float8") / request.param
    options = {"dtype": "auto" if INVARIANT else "float32", "kv_cache_dtype": CASES[request.param]}
    if request.param in RANDOM:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(RANDOM[request.param]))
        return Setup(model=folder, load_format="dummy", **options)
    return Setup(model=scaled_copy(shared_data("stories260K/hf"), folder), **options)


@pytest.fixture(scope="module")
def alone(plain):
    with running(plain) as run:
        return [run.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.combination("float8 KV cache", "continuous batching", "token-equal")
@pytest.mark.combination("float8 KV cache", "chunked prefill", "token-equal")
@pytest.mark.combination("float8 KV cache", "threads", "token-equal")
def test_together_in_chunks(plain, alone):
    check(generate(replace(plain, budget=50, num_threads=2), PROMPTS, PARAMS), alone)


@pytest.mark.combination("float8 KV cache", "prefix cache", "token-equal")
@pytest.mark.combination("float8 KV cache", "preemption", "token-equal")
@pytest.mark.combination("float8 KV cache", "two lanes (semi-PD)", "token-equal")
@pytest.mark.combination("float8 KV cache", "asynchronous scheduling", "token-equal")
def test_crowded_on_two_lanes(plain, alone, monkeypatch):
    monkeypatch.setattr(scheduler, "GROWTH_START", 0.0)
    monkeypatch.setattr(scheduler, "GROWTH_STEP", 0.0)
    lanes = tuple(LaneConfig(name=name, phases=phases, depth=2) for name, phases in (("p", PREFILL), ("d", DECODE)))
    with running(replace(plain, lanes=lanes, num_threads=2, kv_blocks=8, budget=40, prefix_caching=True)) as run:
        check_twins(run, alone)
        assert run.metrics.num_preemptions > 0 and run.metrics.prefix_cache_hits > 0


def test_near_with_scales_and_without(shared_data, tmp_path_factory, caplog):
    """A cache of float8 comes near to one of float32, with scales and without any, of which the log warns; bytes are a quarter."""
    source = shared_data("stories260K/hf")
    scaled = scaled_copy(source, tmp_path_factory.mktemp("near") / "model")
    prompts, params = [p for p in PROMPTS if len(p) > 60], [replace(PARAMS[0], max_tokens=1)] * 3
    exact = generate(Setup(model=source), prompts, params)

    def distance(model, dtype):
        found = generate(Setup(model=model, kv_cache_dtype=dtype), prompts, params)
        return sum(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(found, exact, strict=True)) / len(exact)

    calibrated, warned = distance(scaled, "fp8"), "scale 1.0" in caplog.text
    assert not warned and calibrated < 0.5
    assert distance(source, "fp8_e4m3") < 0.5 and "no calibrated scales for a cache in fp8_e4m3" in caplog.text
    sizes = [sum(group.block_bytes for group in read_spec(source).kv_groups(dtype, 32)) for dtype in ("float32", "fp8")]
    assert sizes[0] == 4 * sizes[1]
