"""The floating-point checkpoint that is compressed: its matrices by name, and all the other tensors, to be copied."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import ModelSpec
from apportion.core.number_format import Scheme
from apportion.kernels.ops import Ops, QuantizedWeight
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import Checkpoint, read_json, read_spec, resolve_folder, respell
from apportion.models.loader import build_model
from apportion.models.registry import SPELLINGS
from apportion.parallel.groups import ParallelGroup
from apportion.quant.checkpoint import is_quantized, read_records
from apportion.quant.scheme import LinearRecords
from apportion.quant.writing import section_of

LAYER = re.compile(r"model\.layers\.(\d+)\.")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj$")
FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


class Source:
    """Errors: InvalidParameter for a checkpoint that is quantized already."""

    def __init__(self, model: str) -> None:
        self.folder: Path = resolve_folder(model)
        self.config = read_json(self.folder / "config.json")
        if is_quantized(self.config):
            raise InvalidParameter(f"{model} is quantized already")
        self.spec: ModelSpec = read_spec(self.folder)
        ops: Ops = ReferenceOps()
        shape = build_model(self.spec, ops, ParallelGroup(), LinearRecords("float32"))
        self._aliases, self._spellings = shape.aliases, SPELLINGS.get(self.spec.architecture, ())
        self._checkpoint = Checkpoint(self.folder, shape.aliases)

    def _tensor(self, name: str) -> Tensor:
        file, stored = self._checkpoint.tensors[name]
        return file.read(stored)

    def published(self, projection: str) -> str:
        """What published checkpoints of the family call a projection: other readers know no other name."""
        return respell(projection, self._spellings)

    def write(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """A file of tensors, under their published names."""
        spelt = {}
        for name, tensor in tensors.items():
            stem, dot, kind = name.rpartition(".")
            spelt[self.published(stem) + dot + kind] = tensor
        save_file(spelt, path, {"format": "pt"})

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file that `write` wrote, under our names."""
        return {respell(name, self._aliases): tensor for name, tensor in load_file(path).items()}

    def matrix(self, name: str) -> Tensor:
        """A projection's weights, float32 [N, C], those of fused experts too."""
        if f"{name}.weight" in self._checkpoint.tensors:
            return self._tensor(f"{name}.weight").float()
        found = EXPERT.fullmatch(name)
        if found is None:
            raise InvalidParameter(f"{self.folder} has no tensor {name}.weight, which is to be quantized")
        stem, expert, part = found[1], int(found[2]), found[3]
        if part == "down":
            return self._tensor(f"{stem}.down_proj")[expert].float()
        gate, up = self._tensor(f"{stem}.gate_up_proj")[expert].chunk(2)
        return (gate if part == "gate" else up).float()

    def linears(self) -> list[str]:
        """Every matrix that is no embedding, norm or bias."""
        names = [name.removesuffix(".weight") for name, (_, stored) in self._checkpoint.tensors.items() if len(stored.shape) == 2]
        names = [name for name in names if not name.endswith("embed_tokens")]
        if self.spec.tied and "lm_head" not in names:
            names.append("lm_head")
        return names

    def layer(self, index: int, replaced: Collection[str]) -> dict[str, Tensor]:
        """Tensors of a layer that are copied. replaced: the projections that are written otherwise."""
        kept = {}
        for name in self._checkpoint.tensors:
            found = LAYER.match(name)
            if found is None or int(found[1]) != index or name.removesuffix(".weight") in replaced:
                continue
            if FUSED.search(name) and any(other.startswith(name.rpartition(".")[0] + ".") for other in replaced):
                continue
            kept[name] = self._tensor(name)
        return kept

    def rest(self) -> dict[str, Tensor]:
        """Tensors outside of the layers."""
        return {name: self._tensor(name).clone() for name in self._checkpoint.tensors if LAYER.match(name) is None}


def assembled(name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], scheme: Scheme, family: str) -> QuantizedWeight:
    """A projection read back from tensors that were written for it."""
    section = {"quantization_config": section_of({name: scheme.name}, (), family)}
    stored = {key: {torch.bfloat16: "BF16", torch.float16: "F16"}.get(t.dtype, "F32") for key, t in tensors.items()}
    record = read_records(section, "float32", None, stored).of(name)
    assert record.layout is not None
    wanted = record.layout.tensors(name, shape, tensors.keys())
    matrix = record.layout.assemble(name, shape, {key: tensors[key] for key in wanted})
    assert isinstance(matrix, QuantizedWeight)
    return matrix
