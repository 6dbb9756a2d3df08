"""Writes a quantized checkpoint of a model, layer by layer: what is rounded how, in which order, what is measured on the way."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from apportion.compress.methods.gptq import gptq
from apportion.compress.methods.rtn import round_to_nearest
from apportion.compress.methods.scaling import awq_scale, clipped, smooth_scale, weighted_error
from apportion.compress.recipe import Recipe, Step
from apportion.compress.report import write_report
from apportion.compress.source import Source, assembled
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
from apportion.quant.writing import section_of, tensors_of

UNSEEN_RANGE = 16.0  # of the input of an expert that no token reached, as AutoFP8 has it
STATE = "progress.json"

Progress = Callable[[int, int, str], None]


def quantize_checkpoint(
    model: str,
    output: Path,
    recipe: Recipe,
    tokens: Sequence[Sequence[int]] = (),
    weights: Sequence[Sequence[float]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize the checkpoint `model` into the folder `output`; returns the report, which is also written beside it (compress/report).

    tokens: calibration sequences, without padding. weights: of each of their tokens, in the statistics of every method. An interrupted
    run goes on behind its last whole layer. Errors: InvalidParameter, Unsupported, CheckpointError.
    """
    started = time.monotonic()
    source = Source(model)
    loaded = load_model(ModelConfig(model=str(source.folder)), source.spec, select_ops(select_platform("cpu")))
    layers = cast(list[DecoderLayer], list(loaded.model.layers))  # type: ignore[attr-defined]
    found = [list(projections(layer)) for layer in layers]
    names = [p.name for layer in found for p in layer]
    schemes = recipe.schemes(names, source.linears(), source.spec.dtype, source.published)
    if recipe.needs_tokens(schemes) and not tokens:
        asked = f"{recipe.method} to {_listed(scheme.name for scheme, _ in schemes.values())}"
        raise InvalidParameter(f"{asked} needs calibration text: give `calibration` (on the command line --calibration FILE)")
    state = _State(output, {"model": str(source.folder), "recipe": str(recipe), "tokens": [list(t) for t in tokens]})
    walk = Walk(loaded, tokens, weights) if recipe.needs_tokens(schemes) else None
    for index, layer in enumerate(layers):
        restored = index in state.done
        if progress:
            progress(index, len(layers), f"layer {index}{' (kept)' if restored else ''}")
        work = _Layer(source, recipe, layer, index, [_Task(p, *schemes[p.name]) for p in found[index] if p.name in schemes])
        if restored:
            work.restore(source.read(output / _shard(index, len(layers))))
        else:
            work.quantize(walk)
            source.write(work.tensors, output / _shard(index, len(layers)))
            state.finish(index, work.entries)
        if walk is not None and index + 1 < len(layers):
            work.replace_weights()
            walk.advance(layer)
    source.write(source.rest(), output / _shard(len(layers), len(layers)))
    report = _write_folder(source, output, recipe, state, len(layers), sum(map(len, tokens)), time.monotonic() - started)
    if progress:
        progress(len(layers), len(layers), "written")
    return report


@dataclass(frozen=True, slots=True)
class _Task:
    projection: Projection
    scheme: Scheme
    step: Step


class _Layer:
    """One layer: its float matrices, and what becomes of them."""

    def __init__(self, source: Source, recipe: Recipe, layer: DecoderLayer, index: int, tasks: Sequence[_Task]) -> None:
        self._recipe, self._layer, self._matrix = recipe, layer, source.matrix
        self._tasks = {task.projection.name: task for task in tasks}
        self.tensors = {name: tensor.clone() for name, tensor in source.layer(index, self._tasks.keys()).items()}
        self.entries: list[dict[str, Any]] = []
        self._near: dict[str, Tensor] = {}

    def quantize(self, walk: Walk | None) -> None:
        needs_hessian = self._recipe.needs_hessian
        seen = walk.observe(self._layer, needs_hessian, self._matrix) if walk is not None else None
        matrices = {name: self._matrix(name) for name in self._tasks}
        if seen is not None and self._recipe.moving:
            self._move_scales(seen, matrices)
        for name, task in self._tasks.items():
            hessian = None if seen is None or not needs_hessian else seen.hessian(task.projection.sees, task.projection.pool)
            rounded = _rounded(matrices[name], task, hessian)
            rounded = replace(rounded, input_scale=_input_scale(task, seen))
            self.tensors |= {key: value.contiguous() for key, value in tensors_of(name, rounded, self._recipe.family).items()}
            self._near[name] = dequantize(rounded)
            self.entries.append(self._measure(task, matrices[name], hessian, seen))
        if seen is not None and self._recipe.kv_cache:
            stem = next(m for m in self._layer.modules() if isinstance(m, Attention)).kv_scales.name.removesuffix(".kv_scales")
            for kind, largest in zip("kv", seen.largest_kv, strict=True):
                self.tensors[f"{stem}.{kind}_scale"] = torch.tensor(max(largest, 1e-6) / 448.0)

    def _measure(self, task: _Task, weight: Tensor, hessian: Tensor | None, seen: Observations | None) -> dict[str, Any]:
        p, near = task.projection, self._near[task.projection.name]
        if hessian is not None:
            error = weighted_error(weight, near, hessian) / max(weighted_error(weight, torch.zeros_like(weight), hessian), 1e-30)
        else:
            error = float((weight - near).square().sum() / weight.square().sum().clamp(min=1e-30))
        n, c = p.shape
        return {
            "name": p.name, "scheme": task.scheme.name, "shape": [n, c], "bytes": task.scheme.weight.stored_bytes(n, c),
            "relative_error": error, "measured_on": "outputs" if hessian is not None else "weights",
            "num_tokens": 0 if seen is None else seen.num_tokens(p.sees),
        }  # fmt: skip

    def _move_scales(self, seen: Observations, matrices: dict[str, Tensor]) -> None:
        """From the inputs of what follows a norm into the norm's weights. Where a linear of the group stays as it is, nothing moves."""
        for norm, part in ((self._layer.input_layernorm, self._layer.self_attn), (self._layer.post_attention_layernorm, self._layer.mlp)):
            qkv = getattr(part, "qkv_proj", None) or getattr(part, "gate_up_proj", None)
            names = [name for name, _ in qkv.projections] if qkv is not None else []
            if not names or not self._tasks.keys() >= set(names):
                continue  # mixtures and latent attention: their routers and absorbed heads read the same norm
            weights, stats = [matrices[name] for name in names], seen.inputs[qkv.name]
            if self._recipe.moving == "awq":
                scale = awq_scale(weights, [self._tasks[name].scheme.weight for name in names], stats)
            else:
                scale = smooth_scale(weights, stats, self._recipe.strength)
            assert isinstance(norm, RMSNorm)
            stored = f"{norm.name}.weight"
            moved = (norm.weight / scale).to(self.tensors[stored].dtype)
            scale = torch.where(moved == 0, scale, norm.weight / moved.float())  # what the rounded norm lost goes to the linears
            norm.weight.copy_(moved)
            self.tensors[stored] = moved
            stats.divide(scale)
            for name in names:
                matrices[name] = matrices[name] * scale

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """What a run before this one wrote for this layer."""
        self.tensors = tensors
        for norm in (self._layer.input_layernorm, self._layer.post_attention_layernorm):
            norm.weight.copy_(tensors[f"{norm.name}.weight"])
        for name, task in self._tasks.items():
            self._near[name] = dequantize(assembled(name, task.projection.shape, tensors, task.scheme, self._recipe.family))

    def replace_weights(self) -> None:
        """Let the layer compute with the rounded matrices, so that those behind it see its errors."""
        for name, task in self._tasks.items():
            task.projection.load(self._near[name])


def _rounded(weight: Tensor, task: _Task, hessian: Tensor | None) -> QuantizedWeight:
    fmt = task.scheme.weight
    if task.step.rounding == "gptq":
        return gptq(weight, fmt, hessian, task.step.damping)
    return clipped(weight, fmt, hessian) if task.step.rounding == "clipped" else round_to_nearest(weight, fmt)


def _input_scale(task: _Task, seen: Observations | None) -> Tensor | None:
    rounded = task.scheme.activation
    if rounded is None or rounded.scale != "static" or seen is None:
        return None
    sees = task.projection.sees
    largest = float(seen.inputs[sees].largest.max()) if seen.num_tokens(sees) else UNSEEN_RANGE
    return torch.tensor([max(largest, 1e-6) / (448.0 if not rounded.is_integer else 127.5)])


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
    source: Source, output: Path, recipe: Recipe, state: _State, num_layers: int, num_tokens: int, wall_s: float
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
    spelt = {source.published(name): scheme for name, scheme in schemes.items()}
    section = section_of(spelt, [source.published(name) for name in kept], recipe.family, recipe.kv_cache)
    config = source.config | {"quantization_config": section}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    for file in source.folder.iterdir():
        if file.is_file() and file.name != "config.json" and not re.search(r"\.(safetensors|gguf|bin|pth|index\.json)$", file.name):
            shutil.copy2(file, output / file.name)
    weights = sum(entry["shape"][0] * entry["shape"][1] for entry in entries)
    report = {
        "model": source.config.get("_name_or_path") or source.folder.name, "scheme": _listed(schemes.values()), "method": recipe.method,
        "format": recipe.family, "ignored": kept, "num_calibration_tokens": num_tokens, "wall_s": wall_s, "file_bytes": total,
        "num_quantized_weights": weights, "quantized_bytes": sum(entry["bytes"] for entry in entries),
        "mean_relative_error": sum(e["relative_error"] for e in entries) / max(len(entries), 1), "projections": entries,
    }  # fmt: skip
    write_report(report, output)
    state.close()
    return report


def _listed(schemes: Iterable[str]) -> str:
    return " + ".join(sorted(set(schemes)))
