"""A model folder: where it is, what its config says, and its safetensors files as maps of tensors whose pages can be given back.

The safetensors header is read here (github.com/huggingface/safetensors, "Format") because the library keeps a file's pages until the whole
file is closed, and loading must not hold more than about one tensor of it.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from apportion.core.errors import CheckpointError
from apportion.core.model_spec import ModelSpec

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_DOWNLOADED = ["original/*", "consolidated*"]  # the same weights in their makers' own layouts
GENERATION_DEFAULTS = {  # fields of generation_config.json -> SamplingParams' names
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}  # fmt: skip
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED_DTYPES = FLOAT_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
}  # fmt: skip


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`: a path, or a hub id that is downloaded once (with HF_HUB_OFFLINE only looked up).

    Errors: CheckpointError when there is neither such a folder nor such a repository within reach.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; a model is a folder with config.json and *.safetensors, or one *.gguf")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "/")):
        raise CheckpointError(f"there is no folder {model!r}, and it is not the form of a hub id (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"there is no folder {model!r}, and the hub does not give a model of that name: {reason}") from error


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a folder's config.json; stop tokens that generation_config.json adds are taken too."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json")
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file() and (more := read_json(generation).get("eos_token_id")) is not None:
        known = config.get("eos_token_id")
        merged = [*_as_list(known), *_as_list(more)]
        config["eos_token_id"] = list(dict.fromkeys(merged))
    return ModelSpec.from_hf(config)


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """The sampling fields of generation_config.json, in SamplingParams' names. Its end tokens are in the model's spec already."""
    file = folder / "generation_config.json"
    content = read_json(file) if file.is_file() else {}
    return {ours: content[theirs] for theirs, ours in GENERATION_DEFAULTS.items() if content.get(theirs) is not None}


def read_json(path: Path) -> dict[str, Any]:
    """Errors: CheckpointError naming the file when it holds no JSON object."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; bytes [start, stop) of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class SafetensorsFile:
    """A mapped file. `tensors` is in file order. Errors: CheckpointError naming the file and what is wrong with it."""

    def __init__(self, path: Path, aliases: Sequence[tuple[str, str]] = ()) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        size = len(self._map)
        start = 8 + int.from_bytes(self._map[:8], "little")
        if size < 8 or start > size:
            raise CheckpointError(f"{path} is truncated: its header ends at byte {start}, the file has {size}")
        try:
            header = json.loads(self._map[8:start])
            self.tensors = sorted(self._entries(header, start, aliases), key=lambda t: t.start)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has no valid safetensors header: {error}") from error
        for t in self.tensors:
            if not start <= t.start <= t.stop:
                raise CheckpointError(f"{path} has no valid safetensors header: tensor {t.name} lies at bytes {t.start} to {t.stop}")
            if t.stop > size:
                raise CheckpointError(f"{path} is truncated: tensor {t.name} ends at byte {t.stop}, the file has {size}")

    @staticmethod
    def _entries(header: dict[str, Any], base: int, aliases: Sequence[tuple[str, str]]) -> Iterator[StoredTensor]:
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                yield StoredTensor(respell(name, aliases), entry["dtype"], tuple(entry["shape"]), base + first, base + last)

    def read(self, stored: StoredTensor) -> Tensor:
        """A view of the mapped pages, not to be written. Errors: CheckpointError for a dtype that is not known here."""
        dtype = STORED_DTYPES.get(stored.dtype)
        if dtype is None:
            raise CheckpointError(f"tensor {stored.name} of {self.path} is {stored.dtype}; known: {', '.join(STORED_DTYPES)}")
        if stored.nbytes != prod(stored.shape) * dtype.itemsize:
            raise CheckpointError(f"tensor {stored.name} of {self.path} has {stored.nbytes} bytes, not those of shape {list(stored.shape)}")
        if stored.start % dtype.itemsize:  # the format allows any start; views need aligned ones
            return torch.frombuffer(bytearray(self._map[stored.start : stored.stop]), dtype=dtype).view(stored.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=prod(stored.shape), offset=stored.start).view(stored.shape)

    def release(self, stored: StoredTensor) -> None:
        """Give the pages of a tensor back to the system; reading it again reads the file again."""
        start = stored.start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, stored.stop - start)


def respell(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in aliases:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


class WeightFile(Protocol):
    """A mapped file of tensors: SafetensorsFile, or models/gguf.GgufFile."""

    path: Path
    tensors: list[StoredTensor]

    def read(self, stored: StoredTensor) -> Tensor: ...

    def release(self, stored: StoredTensor) -> None: ...


class Checkpoint:
    """All tensors of a folder: `model.safetensors`, the files that `model.safetensors.index.json` names, or one `*.gguf`.

    aliases: (pattern, replacement) of names to be spelt anew; the first pattern found counts.
    """

    def __init__(self, folder: Path, aliases: Sequence[tuple[str, str]] = ()) -> None:
        self.folder = folder
        self.files = [_open(path, aliases) for path in _weight_files(folder)]
        self.tensors: dict[str, tuple[WeightFile, StoredTensor]] = {}
        for file in self.files:
            for stored in file.tensors:
                if stored.name in self.tensors:
                    raise CheckpointError(f"tensor {stored.name} is in {self.tensors[stored.name][0].path.name} and in {file.path.name}")
                self.tensors[stored.name] = file, stored
        if (folder / INDEX_NAME).is_file():
            for name, file_name in _weight_map(folder).items():
                if respell(name, aliases) not in self.tensors:
                    raise CheckpointError(f"{INDEX_NAME} places tensor {name} in {file_name}, which does not hold it")

    def is_zero(self, name: str) -> bool:
        """Whether a tensor holds nothing but zeros."""
        file, stored = self.tensors[name]
        return not file.read(stored).any()


def _open(path: Path, aliases: Sequence[tuple[str, str]]) -> WeightFile:
    if path.suffix != ".gguf":
        return SafetensorsFile(path, aliases)
    from apportion.models.gguf import GgufFile

    return GgufFile(path, aliases)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to file name, as the index says."""
    places = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(places, dict) or any(not isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX_NAME} must hold a 'weight_map' of tensor names to file names")
    return places


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_NAME).is_file():
        names = sorted(set(_weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(f"{folder / INDEX_NAME} names {len(names)} files; missing: {', '.join(missing) or 'all'}")
        return [folder / name for name in names]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}; it has {len(found)} other files of weights")
    return found
