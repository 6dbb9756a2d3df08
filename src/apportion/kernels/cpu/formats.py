"""Number formats in the words of csrc/cpu/linear.h: which schemes the packed kernels take, and rows of codes as they read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import InternalError
from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.cpu import BYTE_PRODUCTS
from apportion.kernels.cpu.extension import load
from apportion.kernels.ops import QuantizedWeight

ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2, "e4m3": 3, "e5m2": 4, "int8": 5, "int4": 6, "int3": 7, "int2": 8}
ELEMENTS |= {"int5": 9, "int6": 10, "int7": 11}
ZEROS = {"none": 0, "zp": 1, "min": 2}
STEP = 32  # channels, and outputs of a panel


def obstacle(scheme: str) -> str:
    """Why the packed kernels do not take a scheme; empty where they do."""
    parsed = Scheme.parse(scheme)
    weight, activation = parsed.weight, parsed.activation
    rows, group = weight.block
    if weight.element not in ELEMENTS:
        return f"they have no {weight.element}"
    if group % STEP or (rows > 1 and rows % STEP):
        return f"scales for {rows} x {group} numbers do not fill steps of {STEP} channels in panels of {STEP} outputs"
    if activation is None:
        return ""
    if activation.is_float or activation.element == "e5m2":
        return f"they round no input to {activation.element}"
    x_group = activation.block[1]
    if x_group and (x_group % STEP or weight.zero != "none" or (group and max(group, x_group) % min(group, x_group))):
        return f"groups of {x_group} inputs do not go with {weight.name}"
    return ""


def multiplies_bytes(scheme: str, isa: str) -> bool:
    """Whether a set with products of bytes takes both sides of a scheme as integers (rows.h)."""
    parsed = Scheme.parse(scheme)
    if parsed.activation is None or not parsed.activation.is_integer or not parsed.weight.is_integer:
        return False
    if isa == "amx":
        return parsed.weight.element == "int8" and parsed.weight.block[1] % 64 == 0 and not parsed.activation.block[1]
    return isa in BYTE_PRODUCTS


def weight_format(scheme: str) -> Any:
    """The kernels' `WeightFormat` of a scheme that has no obstacle."""
    parsed = Scheme.parse(scheme)
    weight, activation = parsed.weight, parsed.activation
    make = load().WeightFormat
    if weight.is_float:
        return make(ELEMENTS[weight.element])
    given = {} if activation is None else _rounding(activation)
    return make(
        ELEMENTS[weight.element],
        group=weight.block[1],
        common=weight.block[0] != 1,
        scale_dtype=ELEMENTS[weight.scale_dtype],
        zero=ZEROS[weight.zero],
        permuted=weight.permuted,
        **given,
    )


def _rounding(activation: NumberFormat) -> dict[str, Any]:
    return {
        "rounding": 2 if activation.is_integer else 1,
        "input_bits": activation.bits,
        "input_group": activation.block[1],
        "input_fixed": activation.scale == "static",
    }


def code_source(weight: Tensor | QuantizedWeight, scheme: str) -> tuple[Any, list[Tensor]]:
    """Rows as `CodeSource`, and the tensors whose addresses it holds."""
    fmt = Scheme.parse(scheme).weight
    if not isinstance(weight, QuantizedWeight) or weight.format != fmt:
        given = weight.format.name if isinstance(weight, QuantizedWeight) else "floating point"
        raise InternalError(f"a linear of {fmt.name} was given rows in {given}")
    wanted = {"zero": fmt.zero != "none", "order": fmt.permuted, "input_scale": scheme.endswith("static")}
    for name, needed in wanted.items():
        if needed != (getattr(weight, name) is not None):
            raise InternalError(f"rows for {scheme} {'lack' if needed else 'have'} {name}")
    kept = [weight.codes.contiguous(), weight.scale.float().contiguous()]
    zero_dtype = torch.float32 if fmt.zero == "min" else torch.uint8
    for value, dtype in ((weight.zero, zero_dtype), (weight.order, torch.int32), (weight.input_scale, torch.float32)):
        kept.append(torch.empty(0) if value is None else value.to(dtype).contiguous())
    if tuple(kept[1].shape) != fmt.scale_shape(*weight.codes.shape):
        raise InternalError(f"{tuple(weight.codes.shape)} codes of {fmt.name} have scales of shape {tuple(kept[1].shape)}")
    return load().CodeSource(*(tensor.data_ptr() for tensor in kept), fmt.block[0]), kept
