"""`quant_method: awq`, GEMM files: 4 bits with zero points. With C inputs, N outputs, G = C / group_size:

    qweight int32 [C, N / 8], qzeros int32 [G, N / 8], scales float16 [G, N]

Eight outputs share a word; nibble j holds output ORDER[j] of the eight. Zero points are stored as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import unpack
from apportion.quant.scheme import LinearRecord, LinearRecords, Rule
from apportion.quant.schemes.tensors import scales, typed
from apportion.quant.section import Section

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
HARMLESS = ("quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "zero_point")


@dataclass(frozen=True, slots=True)
class AwqLayout:
    format: NumberFormat

    def tensors(self, name: str, shape: tuple[int, int], present: Collection[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
        n, c = shape
        groups = self.format.scale_shape(n, c)[1]
        return {f"{name}.qweight": ((c, -(-n // 8)),), f"{name}.qzeros": ((groups, -(-n // 8)),), f"{name}.scales": ((groups, n),)}

    def assemble(self, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        codes = _outputs(typed(f"{name}.qweight", tensors[f"{name}.qweight"], torch.int32), shape[0])
        zero = _outputs(typed(f"{name}.qzeros", tensors[f"{name}.qzeros"], torch.int32), shape[0])
        scale = scales(f"{name}.scales", tensors[f"{name}.scales"], signed=True).T.contiguous()
        return QuantizedWeight(self.format, codes, scale, zero)


def _outputs(words: Tensor, n: int) -> Tensor:
    """int32 [R, n / 8] -> codes uint8 [n, R]."""
    nibbles = unpack(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    codes = torch.empty_like(nibbles)
    codes[:, :, list(ORDER)] = nibbles
    return codes.flatten(1)[:, :n].T.contiguous()


def read(section: Section, dtype: str, stored: Mapping[str, str]) -> LinearRecords:
    version = str(section.take("version", "gemm")).lower()
    if version != "gemm":
        raise Unsupported(f"{section.path}.version is {version!r}; known: 'gemm'")
    bits = section.take("w_bit", 4)
    if (bits := section.take("bits", bits)) != 4:
        raise Unsupported(f"{section.path}.bits is {bits!r}; known: 4")
    group = section.take("q_group_size", 128)
    group = section.take("group_size", group)
    if not isinstance(group, int) or (group != -1 and group < 1):
        raise Unsupported(f"{section.path}.group_size is {group!r}; known: -1 and positive integers")
    if not section.flag("zero_point", True):
        raise Unsupported(f"{section.path}.zero_point is false; known: true")
    skipped = section.words("modules_to_not_convert")
    section.close(HARMLESS)
    fmt = NumberFormat.parse(f"int4_g{group}_zp_f16" if group > 0 else "int4_channel_zp")
    kept = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]
    patterns = [rf"{re.escape(name)}$" for name in kept] + [rf".*{re.escape(name)}" for name in skipped] + [r"lm_head$"]
    return LinearRecords(
        dtype, (Rule(LinearRecord(dtype), "|".join(patterns)), Rule(LinearRecord(fmt.name, AwqLayout(fmt)), kind="Linear"))
    )
