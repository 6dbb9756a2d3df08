"""The records of a model: from the quantization section of its config.json, or from a scheme to quantize to while loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.core.number_format import Scheme
from apportion.core.registry import Registry
from apportion.quant.scheme import LinearRecord, LinearRecords, Rule
from apportion.quant.schemes import gguf
from apportion.quant.section import Section

SECTIONS = ("quantization_config", "compression_config")
READERS: Registry[Callable[[Section, str, Mapping[str, str]], LinearRecords]] = Registry(
    "quant_method",
    {
        "fp8": "apportion.quant.schemes.fp8:read",
        "compressed-tensors": "apportion.quant.schemes.compressed_tensors:read",
        "gptq": "apportion.quant.schemes.gptq:read",
        "awq": "apportion.quant.schemes.awq:read",
    },
)
# quantization=.. while loading; {scale}: the tag of the model's dtype. Any scheme's own name is known too.
PRESETS = {
    "fp8": "e4m3_channel@e4m3_token",
    "fp8_block": "e4m3_b128x128@e4m3_g128",
    "int8": "int8_channel@int8_token",
    "w8a16": "int8_channel",
    "w4a16": "int4_g128{scale}",
}
_TAGS = {"float32": "", "bfloat16": "_bf16", "float16": "_f16"}


def is_quantized(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in SECTIONS)


def read_records(
    config: Mapping[str, Any],
    dtype: str,
    quantization: str | None,
    stored: Mapping[str, str],
    spellings: tuple[tuple[str, str], ...] = (),
) -> LinearRecords:
    """config: of config.json. dtype: of whatever is not quantized. quantization: what the user asked for. stored: names and dtypes of the
    tensors in the files. spellings: see LinearRecords.

    Errors: Unsupported or CheckpointError naming the key that is not understood; InvalidParameter for a quantization that is not known or
    that contradicts the checkpoint.
    """
    key = next((key for key in SECTIONS if config.get(key)), None)
    if key is None and not gguf.TYPES.keys().isdisjoint(stored.values()):
        if quantization not in (None, "gguf"):
            raise InvalidParameter(f"quantization {quantization!r} contradicts the checkpoint, a GGUF file of quantized types")
        return replace(gguf.read(dtype, stored), spellings=spellings)
    if key is None:
        records = LinearRecords(dtype) if quantization is None else online(quantization, dtype)
        return replace(records, spellings=spellings)
    section = Section(config[key], f"config.json: {key}")
    method = section.take("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise Unsupported(f"checkpoints quantized by {method!r} cannot be read; known: {', '.join(sorted(READERS))}, and unquantized ones")
    if quantization not in (None, method):
        raise InvalidParameter(f"quantization {quantization!r} contradicts the checkpoint, which is quantized by {method!r}")
    return replace(READERS.get(method)(section, dtype, stored), spellings=spellings)


def online(quantization: str, dtype: str) -> LinearRecords:
    """Every linear quantized as it is loaded; routers stay in float32 as ever, and the output projection in `dtype` unless a scheme of its
    own follows: "w4a16,lm_head=w8a16"."""
    linears, _, head = quantization.partition(",lm_head=")
    top = LinearRecord(_online_scheme(head, quantization, dtype) if head else dtype)
    return LinearRecords(dtype, (Rule(top, r"lm_head$"), Rule(LinearRecord(_online_scheme(linears, quantization, dtype)), kind="Linear")))


def _online_scheme(preset: str, quantization: str, dtype: str) -> str:
    name = PRESETS.get(preset, preset).format(scale=_TAGS[dtype])
    try:
        scheme = Scheme.parse(name)
    except InvalidParameter as error:
        raise InvalidParameter(f"quantization {quantization!r} is not known; known: {', '.join(PRESETS)}, and schemes: {error}") from error
    if scheme.weight.permuted or (scheme.activation is not None and scheme.activation.scale == "static"):
        raise InvalidParameter(f"quantization {quantization!r} needs calibration; make a checkpoint of it by `apportion quantize`")
    return scheme.name
