"""Writes what the readers of quant/schemes read: a quantized matrix as the tensors of a family, and the family's section of config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import FLOAT8, TORCH_DTYPES, pack

FAMILIES = ("compressed-tensors", "fp8")


def tensors_of(name: str, q: QuantizedWeight, family: str) -> dict[str, Tensor]:
    """The tensors of projection `name`, as schemes/compressed_tensors or schemes/fp8 describe them. Errors: Unsupported."""
    fmt, (n, c) = q.format, q.codes.shape
    stored = TORCH_DTYPES[fmt.scale_dtype]
    inputs = {} if q.input_scale is None else {f"{name}.input_scale": q.input_scale.view(1).float()}
    if fmt.permuted or fmt.zero == "min" or (fmt.is_integer and family == "fp8") or fmt.element not in ("e4m3", *_INTEGERS):
        raise Unsupported(f"{name} is quantized to {fmt.name}, which {family} files cannot hold")
    if not fmt.is_integer:
        scale = q.scale.to(stored)
        spelt = "weight_scale_inv" if family == "fp8" and fmt.scale == "block" else "weight_scale"
        scale = scale.view(()) if family == "fp8" and fmt.scale == "tensor" else scale.view(1) if fmt.scale == "tensor" else scale
        return {f"{name}.weight": q.codes.view(FLOAT8[fmt.element]), f"{name}.{spelt}": scale} | inputs
    tensors = {f"{name}.weight_scale": q.scale.to(stored)} | inputs
    if _packed(fmt):
        tensors |= {f"{name}.weight_packed": pack(q.codes, fmt.bits), f"{name}.weight_shape": torch.tensor([n, c])}
        if q.zero is not None:
            tensors[f"{name}.weight_zero_point"] = pack(q.zero.T.contiguous(), fmt.bits).T.contiguous()
    else:
        tensors[f"{name}.weight"] = (q.codes ^ 0x80).view(torch.int8)
        if q.zero is not None:
            tensors[f"{name}.weight_zero_point"] = (q.zero ^ 0x80).view(torch.int8)
    return tensors


_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))


def _packed(fmt: NumberFormat) -> bool:
    return fmt.is_integer and (fmt.bits < 8 or fmt.scale == "group")


def section_of(schemes: Mapping[str, str], ignored: Sequence[str], family: str, kv_scales: bool = False) -> dict[str, Any]:
    """quantization_config of a model whose projections have these schemes, by name. ignored: linears that stay as they are."""
    if family == "fp8":
        return _fp8_section(schemes, ignored, kv_scales)
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {}
    for i, name in enumerate(distinct):
        scheme = Scheme.parse(name)
        targets = ["Linear"] if len(distinct) == 1 else [key for key, value in schemes.items() if value == name]
        groups[f"group_{i}"] = {
            "targets": targets, "weights": _weights(scheme.weight), "input_activations": _inputs(scheme.activation),
            "output_activations": None, "format": _format(scheme),
        }  # fmt: skip
    formats = {group["format"] for group in groups.values()}
    scheme_of_cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False} if kv_scales else None
    return {
        "quant_method": "compressed-tensors", "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed", "global_compression_ratio": None, "ignore": list(ignored), "kv_cache_scheme": scheme_of_cache,
        "config_groups": groups,
    }  # fmt: skip


def _fp8_section(schemes: Mapping[str, str], ignored: Sequence[str], kv_scales: bool) -> dict[str, Any]:
    distinct = set(schemes.values())
    if len(distinct) != 1:
        raise Unsupported(f"fp8 files hold one scheme, not {', '.join(sorted(distinct))}")
    scheme = Scheme.parse(distinct.pop())
    if scheme.activation is None or scheme.weight.element != "e4m3":
        raise Unsupported(f"fp8 files hold e4m3 weights and inputs, not {scheme.name}")
    static = scheme.activation.scale == "static"
    section: dict[str, Any] = {
        "quant_method": "fp8", "activation_scheme": "static" if static else "dynamic", "ignored_layers": list(ignored),
    }  # fmt: skip
    if scheme.weight.scale == "block":
        section |= {"weight_block_size": list(scheme.weight.block), "fmt": "e4m3"}
    return section | ({"kv_cache_scheme": "static"} if kv_scales else {})


def _format(scheme: Scheme) -> str:
    if not scheme.weight.is_integer:
        return "float-quantized"
    return "pack-quantized" if _packed(scheme.weight) else "int-quantized"


def _weights(fmt: NumberFormat) -> dict[str, Any]:
    return {
        "num_bits": fmt.bits, "type": "int" if fmt.is_integer else "float", "symmetric": fmt.zero == "none", "strategy": fmt.scale,
        "group_size": fmt.block[1] if fmt.scale == "group" else None, "block_structure": list(fmt.block) if fmt.scale == "block" else None,
        "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip


def _inputs(fmt: NumberFormat | None) -> dict[str, Any] | None:
    if fmt is None:
        return None
    static = fmt.scale == "static"
    return {
        "num_bits": 8, "type": "int" if fmt.is_integer else "float", "symmetric": True,
        "strategy": "tensor" if static else fmt.scale, "group_size": fmt.block[1] if fmt.scale == "group" else None,
        "block_structure": None, "dynamic": not static, "actorder": None, "observer": "minmax" if static else None,
        "observer_kwargs": {},
    }  # fmt: skip
