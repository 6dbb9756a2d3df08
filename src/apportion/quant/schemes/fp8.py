"""`quant_method: fp8`: AutoFP8, vLLM's own and DeepSeek's block files. Weights e4m3; scales multiply, `weight_scale_inv` too.

weight [N, C] float8_e4m3fn, weight_scale float32 [] or [1] (one for each output: [N] or [N, 1]), input_scale [] or [1] where static
weight_scale_inv float32 [ceil(N / 128), ceil(C / 128)] where `weight_block_size` says so
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import FLOAT8
from apportion.quant.scheme import LinearRecord, LinearRecords, Rule
from apportion.quant.schemes.tensors import float8_codes, scales, typed
from apportion.quant.section import Section, kv_cache_format, names_pattern

HARMLESS = ("dequantize", "modules_in_block_to_quantize")


@dataclass(frozen=True, slots=True)
class Float8Layout:
    """format: e4m3 with a channel or block scale, whichever the product uses; a tensor scale in the file becomes one for each output."""

    format: NumberFormat
    static: bool = False

    def tensors(self, name: str, shape: tuple[int, int], present: Collection[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
        n, c = shape
        found: dict[str, tuple[tuple[int, ...], ...]] = {f"{name}.weight": (shape,)}
        if self.format.scale == "block":
            suffix = "weight_scale" if f"{name}.weight_scale" in present else "weight_scale_inv"
            found[f"{name}.{suffix}"] = (self.format.scale_shape(n, c),)
        else:
            found[f"{name}.weight_scale"] = ((), (1,), (n,), (n, 1), (1, 1))
        if self.static:
            found[f"{name}.input_scale"] = ((), (1,))
        return found

    def assemble(self, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        n, c = shape
        codes = float8_codes(f"{name}.weight", typed(f"{name}.weight", tensors[f"{name}.weight"], FLOAT8[self.format.element]))
        suffix = "weight_scale" if f"{name}.weight_scale" in tensors else "weight_scale_inv"
        scale = scales(f"{name}.{suffix}", tensors[f"{name}.{suffix}"])
        scale = scale.view(self.format.scale_shape(n, c)) if self.format.scale == "block" else scale.reshape(-1, 1).expand(n, 1)
        static = scales(f"{name}.input_scale", tensors[f"{name}.input_scale"]).view(1) if self.static else None
        return QuantizedWeight(self.format, codes, scale, input_scale=static)


def read(section: Section, dtype: str, stored: Mapping[str, str]) -> LinearRecords:
    section.choice("fmt", ("e4m3",), "e4m3")
    section.choice("scale_fmt", ("float",), "float")
    activation = section.choice("activation_scheme", ("static", "dynamic"), "dynamic")
    skipped = names_pattern([*section.words("ignored_layers"), *section.words("modules_to_not_convert"), *section.words("ignore_patterns")])
    block = section.take("weight_block_size")
    kv_cache = kv_cache_format(section)
    section.close(HARMLESS)
    element = "e4m3fnuz" if "F8_E4M3FNUZ" in stored.values() else "e4m3"
    weight, rounded = f"{element}_channel", "e4m3_static" if activation == "static" else "e4m3_token"
    if block is not None:
        if not isinstance(block, list) or len(block) != 2 or any(not isinstance(size, int) or size < 1 for size in block):
            raise Unsupported(f"{section.path}.weight_block_size is {block!r}; known: two positive integers, such as [128, 128]")
        if activation == "static":
            raise Unsupported(f"{section.path}.activation_scheme is 'static', and with weight_block_size only 'dynamic' has a meaning")
        weight, rounded = f"{element}_b{block[0]}x{block[1]}", f"e4m3_g{block[1]}"
    record = LinearRecord(f"{weight}@{rounded}", Float8Layout(NumberFormat.parse(weight), activation == "static"))
    kept = [Rule(LinearRecord(dtype), skipped)] if skipped else []
    return LinearRecords(dtype, (*kept, Rule(LinearRecord(dtype), r"lm_head$"), Rule(record, kind="Linear")), kv_cache_dtype=kv_cache)
