"""The quantized types of GGUF (github.com/ggml-org/ggml, ggml-common.h), their blocks taken apart number by number: nothing is rounded.

Q8_0  32 numbers: d f16, int8 [32]                                          -> int8_g32_f16
Q4_0  32 numbers: d f16, nibbles [16]: number i low, i + 16 high            -> int4_g32_f16
Q4_K  256 numbers: d, dmin f16, 8 six-bit scales and minima in 12 bytes,    -> int4_g32_min (products of two scales need float32)
      nibbles [128]: of 64 numbers the first 32 low, the others high
Q6_K  256 numbers: low nibbles [128], high pairs [64], int8 scales [16], d  -> int6_g16
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.core.errors import CheckpointError
from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import QuantizedWeight
from apportion.quant.scheme import LinearRecord, LinearRecords, Rule

# type -> (format, numbers in a block, bytes of a block)
TYPES = {
    "Q8_0": ("int8_g32_f16", 32, 34),
    "Q4_0": ("int4_g32_f16", 32, 18),
    "Q4_K": ("int4_g32_min", 256, 144),
    "Q6_K": ("int6_g16", 256, 210),
}


@dataclass(frozen=True, slots=True)
class GgufLayout:
    kind: str

    def tensors(self, name: str, shape: tuple[int, int], present: Collection[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {f"{name}.weight": (shape,)}

    def assemble(self, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        spelt, numbers, size = TYPES[self.kind]
        n, c = shape
        stored = tensors[f"{name}.weight"]
        if c % numbers or stored.shape != (n, c // numbers * size):
            raise CheckpointError(f"tensor {name}.weight holds {stored.numel()} bytes of {self.kind}, which are not {n} rows of {c}")
        codes, scale, minimum = TAKEN_APART[self.kind](stored.reshape(-1, size))
        if not scale.isfinite().all() or (minimum is not None and not minimum.isfinite().all()):
            raise CheckpointError(f"tensor {name}.weight holds a scale that is NaN or infinite")
        zero = None if minimum is None else minimum.view(n, -1)
        return QuantizedWeight(NumberFormat.parse(spelt), codes.view(n, c), scale.view(n, -1), zero)


Parts = tuple[Tensor, Tensor, Tensor | None]


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:] ^ 0x80, _half(blocks, 0), None


def _q4_0(blocks: Tensor) -> Parts:
    return torch.cat((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), 1), _half(blocks, 0), None


def _q4_k(blocks: Tensor) -> Parts:
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, high & 15 | low >> 6 << 4), 1)
    minimum = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), 1)
    nibbles = blocks[:, 16:].reshape(-1, 4, 1, 32)
    codes = torch.cat((nibbles & 15, nibbles >> 4), 2)
    return codes, _half(blocks, 0) * scale, -(_half(blocks, 2) * minimum)


def _q6_k(blocks: Tensor) -> Parts:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), 2).view(-1, 2, 4, 32)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = torch.cat([pairs >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    scale = blocks[:, 192:208].contiguous().view(torch.int8)
    return low | high << 4, _half(blocks, 208) * scale, None


TAKEN_APART: dict[str, Callable[[Tensor], Parts]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_K": _q4_k, "Q6_K": _q6_k}


def read(dtype: str, stored: Mapping[str, str]) -> LinearRecords:
    """stored: names and types of the tensors. Every tensor says itself what it is; a layer's experts are of one type."""
    patterns: dict[str, dict[str, None]] = {}
    for name, kind in stored.items():
        if kind in TYPES:
            pattern = re.sub(r"experts\\\.\d+", r"experts\\.\\d+", re.escape(name.removesuffix(".weight")))
            patterns.setdefault(kind, {})[pattern] = None
    rules = []
    for kind, found in patterns.items():
        record = LinearRecord(TYPES[kind][0], GgufLayout(kind))
        rules += [Rule(record, f"{pattern}$") for pattern in found]
    return LinearRecords(dtype, tuple(rules))
