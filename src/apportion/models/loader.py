"""From a checkpoint to a model whose packed weights lie in one arena, which other processes can map by its manifest.

Tensors stream from the mapped files into the arena, in file order; pages are given back, so that memory peaks at packed size + a tensor.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from apportion.core.config import ModelConfig
from apportion.core.errors import CheckpointError, InternalError
from apportion.core.model_spec import ModelSpec
from apportion.kernels.ops import Ops
from apportion.kernels.reference.ops import ReferenceOps
from apportion.layers.site import Activations, Site
from apportion.layers.weights import JointSource, Source, TensorSource, WeightLayer
from apportion.models.checkpoint import FLOAT_DTYPES, Checkpoint, read_json, resolve_folder
from apportion.models.interface import CausalLM
from apportion.models.registry import MODELS, SPELLINGS
from apportion.parallel.groups import ParallelGroup
from apportion.platforms.arena import Arena
from apportion.platforms.memory import trim_heap
from apportion.quant.checkpoint import is_quantized, read_records
from apportion.quant.scheme import LinearRecords

ALIGNMENT = 256  # bytes
MANIFEST_FORMAT = 2
HARMLESS = (r"\.rotary_emb\.inv_freq$",)  # buffers that old checkpoints carry and no model needs
DUMMY_SCALE = 0.035  # uniform in +-this: the spread of the usual normal(0, 0.02)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """manifest: what `attach_model` needs beside the arena, plain data for JSON."""

    model: CausalLM
    arena: Arena
    manifest: dict[str, Any]

    @property
    def spec(self) -> ModelSpec:
        return self.model.site.spec


def load_model(
    config: ModelConfig,
    spec: ModelSpec,
    ops: Ops,
    group: ParallelGroup | None = None,
    progress: Progress | None = None,
    create_arena: Callable[[int], Arena] = Arena.create,
) -> LoadedModel:
    """Build the model of `spec`, pack this rank's part of the checkpoint `config.model` into a new arena. create_arena: the platform's.
    Errors: CheckpointError naming missing, unexpected, misshapen or truncated tensors.
    """
    records = read_model_records(config, spec)
    dummy = config.load_format == "dummy"
    model = build_model(spec, ops, group or ParallelGroup(), records.without_layouts() if dummy else records)
    manifest = layout(model)
    layers = weight_layers(model)
    if dummy:
        arena = create_arena(manifest["nbytes"])
        _bind(layers, manifest, arena)
        _fill_dummy(layers, config.seed)
    else:
        checkpoint = Checkpoint(resolve_folder(config.model, config.revision), model.aliases)
        sources = match_sources(layers, checkpoint, spec)
        arena = create_arena(manifest["nbytes"])  # after the checks: a bad checkpoint costs no memory
        _bind(layers, manifest, arena)
        _stream(checkpoint, sources, progress or _silent)
        trim_heap()
    return LoadedModel(model, arena, manifest)


def attach_model(manifest: Mapping[str, Any], arena: Arena, ops: Ops, group: ParallelGroup | None = None) -> LoadedModel:
    """The model of `manifest` over weights that another process packed into `arena`; nothing is loaded.

    Errors: InternalError when this process would lay the weights out otherwise (other kernels, another rank, another version).
    """
    spec = ModelSpec.from_dict(manifest["spec"])
    model = build_model(spec, ops, group or ParallelGroup(), LinearRecords.from_dict(manifest["records"]))
    own = layout(model)
    for key in own:
        if own[key] != manifest.get(key):
            raise InternalError(f"packed weights cannot be shared: {key} differs between the process that packed them and this one")
    _bind(weight_layers(model), own, arena)
    return LoadedModel(model, arena, own)


def read_model_records(config: ModelConfig, spec: ModelSpec) -> LinearRecords:
    """How each projection is stored and multiplied: as config.json says, or as `config.quantization` asks.

    Errors: Unsupported, CheckpointError, InvalidParameter, as quant/checkpoint says.
    """
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    folder = resolve_folder(config.model, config.revision)
    described = read_json(folder / "config.json")
    stored: dict[str, str] = {}
    if config.load_format != "dummy" and (is_quantized(described) or any(folder.glob("*.gguf"))):
        stored = {tensor.name: tensor.dtype for file in Checkpoint(folder).files for tensor in file.tensors}
    return read_records(described, dtype, config.quantization, stored, SPELLINGS.get(spec.architecture, ()))


def with_formats(config: ModelConfig, spec: ModelSpec) -> ModelSpec:
    """The spec with what its number formats decide. Nothing is loaded. Errors: as read_model_records."""
    records = read_model_records(config, spec)
    if not records.rules:
        return spec
    packed = layout(build_model(spec, ReferenceOps(), ParallelGroup(), records))
    return replace(spec, quantized_bytes=int(packed["nbytes"]), kv_cache_dtype=records.kv_cache_dtype)


def build_model(spec: ModelSpec, ops: Ops, group: ParallelGroup, records: LinearRecords) -> CausalLM:
    """The module tree without weights."""
    site = Site(spec, ops, group, records, Activations(ops.device))
    model = MODELS.get(spec.architecture)(site)
    for module in cast(nn.Module, model).modules():
        # nn.Module finds a child through __getattr__ only: as plain attributes they take 0.07 ms of a 16-layer step instead of 0.2.
        # Assigning another module later replaces both.
        module.__dict__.update(module._modules)
    return model


def weight_layers(model: CausalLM) -> list[WeightLayer]:
    """The leaves that own weights, in the order of the tree."""
    return [cast(WeightLayer, module) for module in cast(nn.Module, model).modules() if hasattr(type(module), "sources")]


def layout(model: CausalLM) -> dict[str, Any]:
    """The manifest: where each layer's bytes lie. It equals what JSON makes of it."""
    entries, offset = [], 0
    for layer in weight_layers(model):
        entries.append({"name": layer.name, "offset": offset, "nbytes": layer.nbytes, "layer": layer.describe()})
        offset += -(-layer.nbytes // ALIGNMENT) * ALIGNMENT
    site = model.site
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "kernels": site.ops.name,
        "rank": site.group.rank,
        "tensor_parallel_size": site.group.size,
        "dtype": site.records.dtype,
        "records": site.records.as_dict(),
        "spec": site.spec.as_dict(),
        "nbytes": offset,
        "entries": entries,
    }
    return dict(json.loads(json.dumps(manifest)))


def match_sources(layers: Iterable[WeightLayer], checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, list[Source]]:
    """Every tensor and what takes it. Errors: CheckpointError for one that is missing, unexpected, misshapen or mistyped."""
    present = checkpoint.tensors.keys()
    sources: dict[str, list[Source]] = {}
    for layer in layers:
        for source in layer.sources(present):
            for name in [source.name] if isinstance(source, TensorSource) else source.shapes:
                sources.setdefault(name, []).append(source)
    if missing := [name for name in sources if name not in present]:
        raise CheckpointError(f"{checkpoint.folder} lacks {_some(missing)}")
    harmless = (*HARMLESS, r"^lm_head\.weight$") if spec.tied else HARMLESS  # tied: a copy of the embeddings
    unused = [name for name in present if name not in sources and not any(re.search(pattern, name) for pattern in harmless)]
    unused = [name for name in unused if not (name.endswith(".bias") and checkpoint.is_zero(name))]  # AutoGPTQ writes biases nobody has
    if unused:
        raise CheckpointError(f"{checkpoint.folder} has tensors that {spec.architecture} does not use: {_some(unused)}")
    for name, (first, *_) in sources.items():
        _, stored = checkpoint.tensors[name]
        shapes = (first.shape,) if isinstance(first, TensorSource) else first.shapes[name]
        if stored.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(f"tensor {name} must have shape {wanted}, in {checkpoint.folder} it has {list(stored.shape)}")
        if isinstance(first, TensorSource) and stored.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"tensor {name} of {checkpoint.folder} is {stored.dtype}; weights must be {', '.join(FLOAT_DTYPES)}")
    return sources


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _bind(layers: list[WeightLayer], manifest: Mapping[str, Any], arena: Arena) -> None:
    for layer, entry in zip(layers, manifest["entries"], strict=True):
        layer.bind(arena.tensor[entry["offset"] : entry["offset"] + entry["nbytes"]])


def _stream(checkpoint: Checkpoint, sources: Mapping[str, list[Source]], progress: Progress) -> None:
    """In file order; tensors that belong together are taken when the first of them comes up."""
    taken: set[int] = set()
    done, total = 0, sum(checkpoint.tensors[name][1].nbytes for name in sources)
    progress(done, total)
    for file in checkpoint.files:
        for stored in file.tensors:
            if stored.name not in sources:
                continue
            tensor = file.read(stored)
            for source in sources[stored.name]:
                if isinstance(source, TensorSource):
                    part = tensor[source.index]
                    if part.numel():
                        source.load(part.contiguous())
                        file.release(stored)  # each piece by itself: an embedding is larger than a layer
                elif id(source) not in taken:
                    taken.add(id(source))
                    _load_joint(source, checkpoint)
            file.release(stored)
            done += stored.nbytes
            progress(done, total)


def _load_joint(source: JointSource, checkpoint: Checkpoint) -> None:
    places = {name: checkpoint.tensors[name] for name in source.shapes}
    source.load({name: file.read(stored) for name, (file, stored) in places.items()})
    for file, stored in places.values():
        file.release(stored)


def _silent(done: int, total: int) -> None:
    """No progress is wanted."""


def _fill_dummy(layers: Iterable[WeightLayer], seed: int) -> None:
    """Random numbers of the right shapes, equal for equal parts of a tensor whichever rank asks."""
    for source in _all_sources(layers):
        shape = [len(range(*part.indices(size))) for part, size in zip(source.index, source.shape, strict=True)]
        if 0 in shape:
            continue
        starts = [part.indices(size)[0] for part, size in zip(source.index, source.shape, strict=True)]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {source.name} {starts}".encode()))
        values = (
            torch.empty(shape).uniform_(-DUMMY_SCALE, DUMMY_SCALE, generator=generator) if source.init == "normal" else torch.ones(shape)
        )
        source.load(values)


def _all_sources(layers: Iterable[WeightLayer]) -> Iterator[TensorSource]:
    for layer in layers:
        for source in layer.sources(()):
            if not isinstance(source, TensorSource):
                raise InternalError(f"{layer.name} cannot be filled with random weights: it asks for {', '.join(source.shapes)}")
            yield source
