"""Writes a quantized checkpoint of a model, layer by layer: what is rounded how, in which order, what is measured on the way."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apportion.compress.methods.gptq import gptq
from apportion.compress.methods.rtn import round_to_nearest
from apportion.compress.methods.scaling import awq_scale, clipped, smooth_scale, weighted_error
from apportion.compress.source import Source
from apportion.compress.walk import Observations, Projection, Walk, projections
from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.core.number_format import Scheme
from apportion.kernels.dispatch import select_ops
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import dequantize
from apportion.layers.attention import Attention
from apportion.layers.norm import RMSNorm
from apportion.models.decoder import DecoderLayer
from apportion.models.loader import load_model
from apportion.platforms.platform import select_platform
from apportion.quant.section import names_pattern
from apportion.quant.writing import FAMILIES, section_of, tensors_of

# The schemes' names elsewhere (llm-compressor's presets, vLLM's words); any scheme's own name is known too.
PRESETS = {
    "fp8": "e4m3_channel@e4m3_token", "fp8_dynamic": "e4m3_channel@e4m3_token", "fp8_static": "e4m3_tensor@e4m3_static",
    "fp8_block": "e4m3_b128x128@e4m3_g128", "w8a8": "int8_channel@int8_token", "int8": "int8_channel@int8_token", "w8a16": "int8_channel",
    "w4a16": "int4_g128{tag}", "w4a16_asym": "int4_g128_zp{tag}", "w3a16": "int3_g128{tag}", "w2a16": "int2_g64_zp{tag}",
}  # fmt: skip
TAGS = {"float32": "", "bfloat16": "_bf16", "float16": "_f16"}
METHODS = ("rtn", "gptq", "awq", "smoothquant")
UNSEEN_RANGE = 16.0  # of the input of an expert that no token reached, as AutoFP8 has it
STATE = "progress.json"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """scheme: a name of PRESETS or of a scheme. ignore: names that stay as they are; 're:' starts an expression.

    family: of the files written. kv_cache: calibrate scales for a float8 KV cache.
    """

    scheme: str
    method: str = "rtn"
    ignore: tuple[str, ...] = ("lm_head",)
    family: str = "compressed-tensors"
    kv_cache: bool = False

    def resolved(self, dtype: str) -> Scheme:
        """Errors: InvalidParameter for what is not known or has no meaning together."""
        scheme = Scheme.parse(PRESETS.get(self.scheme.lower(), self.scheme).format(tag=TAGS[dtype]))
        if self.method not in METHODS:
            raise InvalidParameter(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")
        if self.family not in FAMILIES:
            raise InvalidParameter(f"unknown format {self.family!r}; known: {', '.join(FAMILIES)}")
        if self.family == "fp8" and scheme.weight.scale == "channel":  # its files have one scale for a tensor
            scheme = Scheme(replace(scheme.weight, scale="tensor", block=(0, 0)), scheme.activation)
        if self.method == "smoothquant" and scheme.activation is None:
            raise InvalidParameter(f"smoothquant moves outliers of inputs, which {scheme.name} does not round")
        return scheme

    def needs_tokens(self, scheme: Scheme) -> bool:
        return self.method != "rtn" or self.kv_cache or (scheme.activation is not None and scheme.activation.scale == "static")


def quantize_checkpoint(
    model: str,
    output: Path,
    recipe: Recipe,
    tokens: Sequence[Sequence[int]] = (),
    weights: Sequence[Sequence[float]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize the checkpoint `model` into the folder `output`; returns the report, which is also written as quantization_report.json.

    tokens: calibration sequences, without padding. weights: of each of their tokens, in the statistics of every method. An interrupted
    run goes on behind its last whole layer. Errors: InvalidParameter, Unsupported, CheckpointError.
    """
    started = time.monotonic()
    source = Source(model)
    scheme = recipe.resolved(source.spec.dtype)
    if recipe.needs_tokens(scheme) and not tokens:
        raise InvalidParameter(f"method {recipe.method!r} with {scheme.name} needs calibration text")
    loaded = load_model(ModelConfig(model=str(source.folder)), source.spec, select_ops(select_platform("cpu")))
    state = _State(output, {"model": str(source.folder), "scheme": scheme.name, "recipe": str(recipe), "tokens": [list(t) for t in tokens]})
    walk = Walk(loaded, tokens, weights) if recipe.needs_tokens(scheme) else None
    ignored = names_pattern(recipe.ignore)
    layers = cast(list[DecoderLayer], list(loaded.model.layers))  # type: ignore[attr-defined]
    for index, layer in enumerate(layers):
        if progress:
            progress(index, len(layers), f"layer {index}")
        chosen = [p for p in projections(layer) if not (ignored and re.match(ignored, p.name))]
        work = _Layer(source, scheme, recipe, layer, index, chosen)
        if index in state.done:
            work.restore(load_file(output / _shard(index, len(layers))))
        else:
            work.quantize(walk)
            save_file(work.tensors, output / _shard(index, len(layers)), {"format": "pt"})
            state.finish(index, work.entries)
        if walk is not None and index + 1 < len(layers):
            work.replace_weights()
            walk.advance(layer)
    save_file(source.rest(), output / _shard(len(layers), len(layers)), {"format": "pt"})
    report = _write_folder(source, output, recipe, state, len(layers), scheme, sum(map(len, tokens)), time.monotonic() - started)
    if progress:
        progress(len(layers), len(layers), "written")
    return report


class _Layer:
    """One layer: its float matrices, and what becomes of them."""

    def __init__(
        self, source: Source, scheme: Scheme, recipe: Recipe, layer: DecoderLayer, index: int, chosen: Sequence[Projection]
    ) -> None:
        self._scheme, self._recipe, self._layer, self._chosen = scheme, recipe, layer, list(chosen)
        self._names = {p.name for p in chosen}
        self.tensors = {name: tensor.clone() for name, tensor in source.layer(index, self._names).items()}
        self._matrix = source.matrix
        self.entries: list[dict[str, Any]] = []
        self._near: dict[str, Tensor] = {}

    def quantize(self, walk: Walk | None) -> None:
        needs_hessian = self._recipe.method in ("gptq", "awq")
        seen = walk.observe(self._layer, needs_hessian, self._matrix) if walk is not None else None
        matrices = {p.name: self._matrix(p.name) for p in self._chosen}
        if seen is not None and self._recipe.method in ("awq", "smoothquant"):
            self._move_scales(seen, matrices)
        for p in self._chosen:
            hessian = None
            if seen is not None and needs_hessian:
                hessian = seen.inputs[p.sees].mean_hessian(seen.inputs.get(p.pool)) if p.sees in seen.inputs else None
            rounded = self._round(matrices[p.name], hessian)
            rounded = replace(rounded, input_scale=self._input_scale(p, seen))
            self.tensors |= {key: value.contiguous() for key, value in tensors_of(p.name, rounded, self._recipe.family).items()}
            self._near[p.name] = dequantize(rounded)
            self.entries.append(self._measure(p, matrices[p.name], hessian, seen))
        if seen is not None and self._recipe.kv_cache:
            stem = next(m for m in self._layer.modules() if isinstance(m, Attention)).kv_scales.name.removesuffix(".kv_scales")
            for kind, largest in zip("kv", seen.largest_kv, strict=True):
                self.tensors[f"{stem}.{kind}_scale"] = torch.tensor(max(largest, 1e-6) / 448.0)

    def _round(self, weight: Tensor, hessian: Tensor | None) -> QuantizedWeight:
        fmt, method = self._scheme.weight, self._recipe.method
        if method == "gptq":
            return gptq(weight, fmt, hessian)
        return clipped(weight, fmt, hessian) if method == "awq" else round_to_nearest(weight, fmt)

    def _input_scale(self, p: Projection, seen: Observations | None) -> Tensor | None:
        rounded = self._scheme.activation
        if rounded is None or rounded.scale != "static" or seen is None:
            return None
        largest = float(seen.inputs[p.sees].largest.max()) if p.sees in seen.inputs and seen.inputs[p.sees].num_tokens else UNSEEN_RANGE
        return torch.tensor([max(largest, 1e-6) / (448.0 if not rounded.is_integer else 127.5)])

    def _measure(self, p: Projection, weight: Tensor, hessian: Tensor | None, seen: Observations | None) -> dict[str, Any]:
        near = self._near[p.name]
        if hessian is not None:
            error = weighted_error(weight, near, hessian) / max(weighted_error(weight, torch.zeros_like(weight), hessian), 1e-30)
        else:
            error = float((weight - near).square().sum() / weight.square().sum().clamp(min=1e-30))
        num_tokens = seen.inputs[p.sees].num_tokens if seen is not None and p.sees in seen.inputs else 0
        n, c = p.shape
        return {
            "name": p.name, "scheme": self._scheme.name, "shape": [n, c], "bytes": self._scheme.weight.stored_bytes(n, c),
            "relative_error": error, "measured_on": "outputs" if hessian is not None else "weights", "num_tokens": num_tokens,
        }  # fmt: skip

    def _move_scales(self, seen: Observations, matrices: dict[str, Tensor]) -> None:
        """From the inputs of what follows a norm into the norm's weights. Where a linear of the group stays as it is, nothing moves."""
        for norm, part in ((self._layer.input_layernorm, self._layer.self_attn), (self._layer.post_attention_layernorm, self._layer.mlp)):
            qkv = getattr(part, "qkv_proj", None) or getattr(part, "gate_up_proj", None)
            names = [name for name, _ in qkv.projections] if qkv is not None else []
            if not names or not self._names.issuperset(names):
                continue  # mixtures and latent attention: their routers and absorbed heads read the same norm
            weights, stats = [matrices[name] for name in names], seen.inputs[qkv.name]
            if self._recipe.method == "awq":
                scale = awq_scale(weights, [self._scheme.weight] * len(weights), stats)
                if stats.hessian is not None:
                    stats.hessian /= scale.double().outer(scale.double())
            else:
                scale = smooth_scale(weights, stats)
            stats.largest = stats.largest / scale
            for name in names:
                matrices[name] = matrices[name] * scale
            assert isinstance(norm, RMSNorm)
            norm.weight /= scale
            stored = self.tensors[f"{norm.name}.weight"]
            self.tensors[f"{norm.name}.weight"] = norm.weight.to(stored.dtype).clone()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """What a run before this one wrote for this layer."""
        from apportion.compress.source import assembled

        self.tensors = tensors
        for norm in (self._layer.input_layernorm, self._layer.post_attention_layernorm):
            norm.weight.copy_(tensors[f"{norm.name}.weight"])
        self._near = {p.name: dequantize(assembled(p.name, p.shape, tensors, self._scheme, self._recipe.family)) for p in self._chosen}

    def replace_weights(self) -> None:
        """Let the layer compute with the rounded matrices, so that those behind it see its errors."""
        for p in self._chosen:
            p.load(self._near[p.name])


class _State:
    """Which layers are written, in a file of the output folder. Errors: InvalidParameter for a folder that holds anything else."""

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._file = output / STATE
        self._data: dict[str, Any] = {"settings": settings, "layers": {}}
        before = json.loads(self._file.read_text()) if self._file.is_file() else {}
        if before.get("settings") == settings:
            self._data = before
        elif any(output.iterdir()):
            raise InvalidParameter(f"{output} is not empty{', and what was begun there has other settings' if before else ''}")

    @property
    def done(self) -> set[int]:
        return {int(layer) for layer in self._data["layers"]}

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [entry for layer in sorted(self._data["layers"], key=int) for entry in self._data["layers"][layer]]

    def finish(self, layer: int, entries: list[dict[str, Any]]) -> None:
        self._data["layers"][str(layer)] = entries
        self._file.write_text(json.dumps(self._data))

    def close(self) -> None:
        self._file.unlink()


def _shard(index: int, num_layers: int) -> str:
    return f"model-{index + 1:05d}-of-{num_layers + 1:05d}.safetensors"


def _write_folder(
    source: Source, output: Path, recipe: Recipe, state: _State, num_layers: int, scheme: Scheme, num_tokens: int, wall_s: float
) -> dict[str, Any]:
    """config.json, the index, whatever else lies in the source folder, and the report."""
    from safetensors import safe_open

    places, total = {}, 0
    for index in range(num_layers + 1):
        with safe_open(output / _shard(index, num_layers), "pt") as file:
            places |= dict.fromkeys(file.keys(), _shard(index, num_layers))
        total += (output / _shard(index, num_layers)).stat().st_size
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1))
    entries = state.entries
    schemes = {entry["name"]: entry["scheme"] for entry in entries}
    kept = [name for name in source.linears() if name not in schemes]
    config = source.config | {"quantization_config": section_of(schemes, kept, recipe.family, recipe.kv_cache)}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    for file in source.folder.iterdir():
        if file.is_file() and file.name != "config.json" and not re.search(r"\.(safetensors|gguf|bin|pth|index\.json)$", file.name):
            shutil.copy2(file, output / file.name)
    weights = sum(entry["shape"][0] * entry["shape"][1] for entry in entries)
    report = {
        "model": source.config.get("_name_or_path") or source.folder.name, "scheme": scheme.name, "method": recipe.method,
        "format": recipe.family, "ignored": kept, "num_calibration_tokens": num_tokens, "wall_s": wall_s, "file_bytes": total,
        "num_quantized_weights": weights, "quantized_bytes": sum(entry["bytes"] for entry in entries),
        "mean_relative_error": sum(e["relative_error"] for e in entries) / max(len(entries), 1), "projections": entries,
    }  # fmt: skip
    (output / "quantization_report.json").write_text(json.dumps(report, indent=1))
    state.close()
    return report
