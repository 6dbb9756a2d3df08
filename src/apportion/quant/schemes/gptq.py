"""`quant_method: gptq`: AutoGPTQ, GPTQModel and transformers, 2, 3, 4 and 8 bits. With C inputs, N outputs, G = C / group_size:

    qweight int32 [C * bits / 32, N], codes packed along C     qzeros int32 [G, N * bits / 32], zero points packed along N
    scales float16 [G, N]                                      g_idx int32 [C], the group of each input

Files of format v1 (the usual one) store zero points less one, in the width of a code: reading adds one and masks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.core.errors import CheckpointError, Unsupported
from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import unpack
from apportion.quant.scheme import LinearRecord, LinearRecords, Rule
from apportion.quant.schemes.tensors import regrouped, scales, typed
from apportion.quant.section import Section

# How the file was made; nothing of it changes what the tensors mean.
HARMLESS = (
    "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "model_name_or_path", "model_file_base_name", "meta",
    "tokenizer", "dataset", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id",
    "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "max_input_length", "cache_block_outputs", "backend", "mse",
    "use_cuda_kernels", "quant_method", "format", "act_group_aware", "version",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GptqLayout:
    format: NumberFormat
    group_size: int  # -1: all inputs
    v2: bool = False

    def tensors(self, name: str, shape: tuple[int, int], present: Collection[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
        n, c = shape
        bits, groups = self.format.bits, -(-c // self.group_size) if self.group_size > 0 else 1
        found: dict[str, tuple[tuple[int, ...], ...]] = {
            f"{name}.qweight": ((-(-c * bits // 32), n),),
            f"{name}.qzeros": ((groups, -(-n * bits // 32)),),
            f"{name}.scales": ((groups, n),),
        }
        if self.format.permuted or f"{name}.g_idx" in present:
            found[f"{name}.g_idx"] = ((c,),)
        return found

    def assemble(self, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        n, c = shape
        bits, fmt = self.format.bits, self.format
        codes = unpack(typed(f"{name}.qweight", tensors[f"{name}.qweight"], torch.int32).T.contiguous(), bits, c)
        scale = scales(f"{name}.scales", tensors[f"{name}.scales"], signed=True).T.contiguous()
        zero = unpack(typed(f"{name}.qzeros", tensors[f"{name}.qzeros"], torch.int32), bits, n).T
        zero = (zero if self.v2 else zero + 1 & 2**bits - 1).contiguous()
        if fmt.zero == "none" and (zero != 2 ** (bits - 1)).any():
            raise CheckpointError(f"tensor {name}.qzeros holds zero points, though the config says 'sym': true")
        order = None
        if fmt.permuted:
            codes, order = regrouped(f"{name}.g_idx", codes, tensors[f"{name}.g_idx"], self.group_size)
        elif f"{name}.g_idx" in tensors and self.group_size > 0:
            groups = typed(f"{name}.g_idx", tensors[f"{name}.g_idx"], torch.int32, torch.int64)
            if not torch.equal(groups.long(), torch.arange(c) // self.group_size):
                raise CheckpointError(f"tensor {name}.g_idx reorders inputs, though the config says 'desc_act': false")
        return QuantizedWeight(fmt, codes, scale, zero if fmt.zero == "zp" else None, order)


def read(section: Section, dtype: str, stored: Mapping[str, str]) -> LinearRecords:
    form = section.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    section.choice("pack_dtype", ("int32",), "int32")
    head = section.flag("lm_head", False)
    settings = {"bits": section.take("bits"), "group_size": section.take("group_size", 128)}
    settings |= {"sym": section.take("sym", True), "desc_act": section.take("desc_act", False)}
    overrides, chosen = section.take("dynamic", {}), section.take("modules_in_block_to_quantize")
    section.close(HARMLESS)
    plain, rules = LinearRecord(dtype), []
    for pattern, changes in Section(overrides, f"{section.path}.dynamic").parts():
        if pattern.startswith("-:"):
            rules.append(Rule(plain, pattern[2:]))
        else:
            record = _record(Section(settings | changes, f"{section.path}.dynamic[{pattern!r}]"), form == "gptq_v2")
            rules.append(Rule(record, pattern.removeprefix("+:"), "Linear"))
    kept = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]  # linears nobody quantized, among others
    if kept:
        rules.append(Rule(plain, f"(?:{'|'.join(map(re.escape, kept))})$"))
    if not head:
        rules.append(Rule(plain, r"lm_head$"))
    base = _record(Section(settings, section.path), form == "gptq_v2")
    if chosen:
        endings = [name for names in chosen for name in ([names] if isinstance(names, str) else names)]
        rules.append(Rule(base, rf".*\.(?:{'|'.join(map(re.escape, endings))})$", "Linear"))
    else:
        rules.append(Rule(base, kind="Linear"))
    return LinearRecords(dtype, tuple(rules))


def _record(settings: Section, v2: bool) -> LinearRecord:
    bits = settings.choice("bits", (2, 3, 4, 8))
    group = settings.number("group_size")
    sym, order = settings.flag("sym", True), settings.flag("desc_act", False)
    settings.close(HARMLESS)
    if group != -1 and group < 1:
        raise Unsupported(f"{settings.path}.group_size is {group}; known: -1 and positive numbers")
    scale = f"g{group}" if group > 0 else "channel"
    zero, dtype, perm = "" if sym else "_zp", "_f16" if group > 0 else "", "_perm" if order and group > 0 else ""
    fmt = NumberFormat.parse(f"int{bits}_{scale}{zero}{dtype}{perm}")
    return LinearRecord(fmt.name, GptqLayout(fmt, group, v2))
