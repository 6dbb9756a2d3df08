"""`quant_method: compressed-tensors` (llm-compressor): several groups of projections, each with its weights, inputs and format.

    float- and int-quantized  weight float8_e4m3fn or int8 [N, C], weight_scale [1], [N, 1], [N, G] or [N / r, C / c],
                              weight_zero_point int8 where asymmetric
    pack-quantized            weight_packed int32 [N, ceil(C * bits / 32)], weight_scale [N, G], weight_shape int64 [2],
                              weight_zero_point int32 [ceil(N * bits / 32), G] (packed along N) where asymmetric, weight_g_idx int32 [C]
    static inputs             input_scale [1]

Codes of pack-quantized files are in offset binary, as ours are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apportion.core.errors import CheckpointError, Unsupported
from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import unpack
from apportion.quant.scheme import LinearRecord, LinearRecords, Rule
from apportion.quant.schemes.tensors import float8_codes, regrouped, scales, typed
from apportion.quant.section import Section, kv_cache_format, names_pattern

FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense", "mixed-precision")
HARMLESS = ("quant_method", "global_compression_ratio", "version", "quantization_status")
OBSERVATION = ("observer", "observer_kwargs", "block_structure")  # how scales were found
TAGS = {"F16": "_f16", "BF16": "_bf16"}


@dataclass(frozen=True, slots=True)
class CompressedLayout:
    """format: of the file, a tensor scale included. packed: pack-quantized."""

    format: NumberFormat
    packed: bool = False
    static: bool = False

    def tensors(self, name: str, shape: tuple[int, int], present: Collection[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
        (n, c), fmt = shape, self.format
        groups = fmt.scale_shape(n, c)
        one = ((), (1,), (1, 1)) if groups == (1, 1) else ()
        row = ((n,),) if groups == (n, 1) else ()
        found: dict[str, tuple[tuple[int, ...], ...]] = {f"{name}.weight_scale": (groups, *one, *row)}
        if self.packed:
            found |= {f"{name}.weight_packed": ((n, -(-c * fmt.bits // 32)),), f"{name}.weight_shape": ((2,),)}
        else:
            found[f"{name}.weight"] = (shape,)
        zero = f"{name}.weight_zero_point"
        if fmt.zero == "zp" or zero in present:  # symmetric files may carry zero points of zero
            found[zero] = ((-(-groups[0] * fmt.bits // 32), groups[1]), groups) if self.packed else (groups, *one, *row)
        if fmt.permuted:
            found[f"{name}.weight_g_idx"] = ((c,),)
        if self.static:
            found[f"{name}.input_scale"] = ((), (1,))
        return found

    def assemble(self, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        (n, c), fmt = shape, self.format
        if self.packed:
            stated = tuple(tensors[f"{name}.weight_shape"].tolist())
            if stated != shape:
                raise CheckpointError(f"tensor {name}.weight_shape says {list(stated)}, and the matrix is {list(shape)}")
            codes = unpack(typed(f"{name}.weight_packed", tensors[f"{name}.weight_packed"], torch.int32), fmt.bits, c)
        elif fmt.is_integer:
            codes = _offset(typed(f"{name}.weight", tensors[f"{name}.weight"], torch.int8), fmt.bits)
        else:
            codes = float8_codes(f"{name}.weight", typed(f"{name}.weight", tensors[f"{name}.weight"], torch.float8_e4m3fn))
        groups = fmt.scale_shape(n, c)
        scale = scales(f"{name}.weight_scale", tensors[f"{name}.weight_scale"]).view(groups)
        zero = self._zero(f"{name}.weight_zero_point", groups, tensors)
        order = None
        if fmt.permuted:
            codes, order = regrouped(f"{name}.weight_g_idx", codes, tensors[f"{name}.weight_g_idx"], fmt.block[1])
        static = scales(f"{name}.input_scale", tensors[f"{name}.input_scale"]).view(1) if self.static else None
        return QuantizedWeight(fmt, codes, scale, zero, order, static)

    def _zero(self, name: str, groups: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor | None:
        if name not in tensors:
            return None
        stored, bits = tensors[name], self.format.bits
        if self.packed and stored.dtype == torch.int32:
            zero = unpack(stored.T.contiguous(), bits, groups[0]).T.contiguous()
        else:
            zero = _offset(typed(name, stored, torch.int8).view(groups), bits)
        if self.format.zero == "zp":
            return zero
        if (zero != 2 ** (bits - 1)).any():
            raise CheckpointError(f"tensor {name} is not zero, though the config calls the weights symmetric")
        return None


def _offset(signed: Tensor, bits: int) -> Tensor:
    """Signed codes int8 in offset binary."""
    if signed.numel() and (int(signed.min()) < -(2 ** (bits - 1)) or int(signed.max()) >= 2 ** (bits - 1)):
        raise CheckpointError(f"{bits}-bit weights hold the code {int(signed.abs().max())}")
    return (signed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def read(section: Section, dtype: str, stored: Mapping[str, str]) -> LinearRecords:
    form = section.choice("format", FORMATS, "dense")
    status = section.choice("quantization_status", ("compressed", "frozen"), "compressed")
    ignored = names_pattern(section.words("ignore"))
    groups = section.part("config_groups")
    kv_cache = kv_cache_format(section)
    section.close(HARMLESS)
    if groups is None:
        raise Unsupported(f"{section.path} has no config_groups")
    plain = LinearRecord(dtype)
    rules, classes = [Rule(plain, ignored)] if ignored else [], []
    for key, value in groups.parts():
        group = Section(value, f"{groups.path}.{key}")
        targets = group.words("targets")
        record = _record(group, dtype, group.choice("format", FORMATS, form), stored)
        group.close()
        if status == "frozen" and not isinstance(record.layout, CompressedLayout):
            raise Unsupported(f"{section.path}.quantization_status is 'frozen', and the weights of {group.path} are not compressed")
        for target in targets:
            if target in ("Linear", "Embedding"):
                classes.append(Rule(record, kind=target))
            else:
                rules.append(Rule(record, target_pattern(target)))
    return LinearRecords(dtype, (*rules, *classes), kv_cache_dtype=kv_cache)


def target_pattern(target: str) -> str:
    """compressed-tensors matches expressions from the start of a name, and plain targets as whole names."""
    return target[3:] if target.startswith("re:") else f"{re.escape(target)}$"


def _record(group: Section, dtype: str, form: str, stored: Mapping[str, str]) -> LinearRecord:
    weights, inputs = group.part("weights"), group.part("input_activations")
    if (outputs := group.take("output_activations")) is not None:
        raise Unsupported(f"{group.path}.output_activations = {outputs!r} is not understood; known: null")
    if weights is None:
        raise Unsupported(f"{group.path}.weights is null; activations alone cannot be quantized")
    packed = form == "pack-quantized"
    fmt = weight_format(weights, _scale_tag(stored))
    rounded = None if inputs is None else activation_format(inputs)
    if fmt.is_integer and not packed and fmt.bits != 8 and form != "int-quantized":
        raise Unsupported(f"{group.path}.format is {form!r} for {fmt.bits}-bit integers; known: 'pack-quantized', 'int-quantized'")
    product = replace(fmt, scale="channel", block=(1, 0), scale_dtype="float32") if fmt.scale == "tensor" else fmt
    layout = CompressedLayout(fmt, packed, rounded is not None and rounded.scale == "static")
    return LinearRecord(Scheme(product, rounded).name, layout)


def weight_format(weights: Section, tag: str) -> NumberFormat:
    """The format that `weights` of a config group describe. tag: of the dtype of groups' scales."""
    kind = weights.choice("type", ("int", "float"), "int")
    bits = weights.choice("num_bits", (8,) if kind == "float" else (2, 3, 4, 5, 6, 7, 8), 8)
    symmetric = weights.flag("symmetric", True)
    group = weights.take("group_size", -1)
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block"), "group" if group > 0 else "channel")
    order = weights.choice("actorder", (None, "group", "weight", "static", "dynamic"))
    weights.choice("dynamic", (False,), False)
    block = weights.take("block_structure")
    for key in ("scale_dtype", "zp_dtype"):
        weights.take(key)
    weights.close(OBSERVATION)
    if not symmetric and kind == "float":
        raise Unsupported(f"{weights.path}.symmetric is false for floating point; known: true")
    if strategy == "block":
        sizes = block.split("x") if isinstance(block, str) else block
        if not isinstance(sizes, list) or len(sizes) != 2:
            raise Unsupported(f"{weights.path}.block_structure is {block!r}; known: two integers, such as [128, 128]")
        scale = f"b{int(sizes[0])}x{int(sizes[1])}"
    else:
        scale = f"g{group}" if strategy == "group" else strategy
    if strategy == "group" and group < 1:
        raise Unsupported(f"{weights.path}.group_size is {group}, and strategy 'group' needs a positive one")
    perm = "_perm" if order in ("group", "dynamic") and strategy == "group" else ""
    return NumberFormat.parse(
        f"{'e4m3' if kind == 'float' else f'int{bits}'}_{scale}{'' if symmetric else '_zp'}{tag if strategy == 'group' else ''}{perm}"
    )


def _scale_tag(stored: Mapping[str, str]) -> str:
    """Scales are kept as the file has them; where it has several kinds, in float32, which holds them all."""
    kinds = {dtype for name, dtype in stored.items() if name.endswith(".weight_scale")}
    return TAGS.get(kinds.pop(), "") if len(kinds) == 1 else ""


def activation_format(inputs: Section) -> NumberFormat:
    """What `input_activations` of a config group are rounded to."""
    kind = inputs.choice("type", ("int", "float"), "int")
    inputs.choice("num_bits", (8,), 8)
    group = inputs.take("group_size", -1)
    dynamic = inputs.choice("dynamic", (True, False), False)
    strategy = inputs.choice("strategy", ("tensor", "token", "group"), "token" if dynamic else "tensor")
    if not inputs.flag("symmetric", True):
        raise Unsupported(f"{inputs.path}.symmetric is false; known: true")
    for key in ("scale_dtype", "zp_dtype", "actorder"):
        inputs.take(key)
    inputs.close(OBSERVATION)
    if not dynamic and strategy != "tensor":
        raise Unsupported(f"{inputs.path}.strategy is {strategy!r} without 'dynamic'; known: 'tensor'")
    scale = "static" if not dynamic else f"g{group}" if strategy == "group" else "token"  # a dynamic tensor scale would mix requests
    return NumberFormat.parse(f"{'e4m3' if kind == 'float' else 'int8'}_{scale}")
