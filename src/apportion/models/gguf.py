"""A GGUF file (github.com/ggml-org/ggml, docs/gguf.md) as a map of tensors under the names of a safetensors checkpoint.

Shapes are those of the numbers; what `read` gives for a quantized type are its bytes, uint8 [rows, bytes of a row] (quant/schemes/gguf).
Experts, one tensor in the file, appear one by one. config.json and the tokenizer lie beside the file.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import CheckpointError, Unsupported
from apportion.models.checkpoint import StoredTensor, respell

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = ("Q8_0", "Q4_0", "Q4_K", "Q6_K")
ARCHITECTURES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
INTERLEAVED = ("llama",)  # their writers reorder the rows of q and k to rotate neighbours instead of halves
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj", "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
DERIVED = ("rope_freqs.weight",)  # follows from config.json's rope scaling


class GgufFile:
    """A mapped file, read like a SafetensorsFile. Errors: CheckpointError, Unsupported naming the file and what is not understood."""

    def __init__(self, path: Path, aliases: Sequence[tuple[str, str]] = ()) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise Unsupported(f"{path} is a GGUF file, which the package gguf reads: pip install '.[gguf]' in the checkout") from error
        self.path = path
        try:
            reader = GGUFReader(str(path))
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path} is no valid GGUF file: {error}") from error
        self.architecture = str(_field(reader, path, "general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise Unsupported(f"{path} holds the architecture {self.architecture!r}; known in GGUF: {', '.join(ARCHITECTURES)}")
        heads = int(_field(reader, path, f"{self.architecture}.attention.head_count"))
        self._heads = {"attn_q": heads, "attn_k": int(_field(reader, path, f"{self.architecture}.attention.head_count_kv"))}
        self._permuted: dict[str, int] = {}
        self.tensors = sorted(self._entries(reader, aliases), key=lambda t: t.start)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for t in self.tensors:
            if t.stop > len(self._map):
                raise CheckpointError(f"{path} is truncated: tensor {t.name} ends at byte {t.stop}, the file has {len(self._map)}")

    def _entries(self, reader: Any, aliases: Sequence[tuple[str, str]]) -> Iterator[StoredTensor]:
        for tensor in reader.tensors:
            if tensor.name in DERIVED:
                continue
            kind = tensor.tensor_type.name
            if kind not in FLOATS and kind not in QUANTIZED:
                raise Unsupported(f"tensor {tensor.name} of {self.path} is {kind}; known: {', '.join((*FLOATS, *QUANTIZED))}")
            names, part, suffix = self._names(tensor.name, tensor.shape.tolist())
            shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))[-2 if len(names) > 1 else 0 :]
            nbytes = int(tensor.n_bytes) // len(names)
            for i, name in enumerate(names):
                start = int(tensor.data_offset) + i * nbytes
                stored = StoredTensor(respell(f"{name}.{suffix}", aliases), kind, shape, start, start + nbytes)
                if self.architecture in INTERLEAVED and part in self._heads:
                    self._permuted[stored.name] = self._heads[part]
                yield stored

    def _names(self, name: str, shape: list[int]) -> tuple[list[str], str, str]:
        """(the checkpoint's names, the part as GGUF calls it, weight or bias)."""
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", name)
        if found is None or found[2] not in NAMES:
            raise Unsupported(f"tensor {name} of {self.path} is not known")
        stem = f"model.layers.{found[1]}.{NAMES[found[2]]}" if found[1] is not None else NAMES[found[2]]
        return [stem.format(e) for e in range(shape[-1])] if "{}" in stem else [stem], found[2], found[3]

    def read(self, stored: StoredTensor) -> Tensor:
        """Floating point as it is; of other types the bytes, uint8 [rows, bytes of a row]. Not to be written."""
        if stored.dtype in FLOATS:
            dtype = FLOATS[stored.dtype]
            tensor = torch.frombuffer(self._map, dtype=dtype, count=stored.nbytes // dtype.itemsize, offset=stored.start).view(stored.shape)
        else:
            tensor = torch.frombuffer(self._map, dtype=torch.uint8, count=stored.nbytes, offset=stored.start).view(stored.shape[0], -1)
        if (heads := self._permuted.get(stored.name)) is not None:
            tensor = tensor.reshape(heads, stored.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def release(self, stored: StoredTensor) -> None:
        """Give the pages of a tensor back to the system."""
        start = stored.start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, stored.stop - start)


def _field(reader: Any, path: Path, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise CheckpointError(f"{path} has no {key}")
    return field.contents()
