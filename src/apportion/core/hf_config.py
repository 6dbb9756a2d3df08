"""Reads a ModelSpec from a Hugging Face config.json: transformers-5 style (`rope_parameters`, `dtype`) and older ones (`rope_theta`,
`rope_scaling`, `torch_dtype`). A missing field takes the default of the model's own transformers configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from apportion.core.config import DTYPES
from apportion.core.errors import CheckpointError, Unsupported
from apportion.core.model_spec import ModelSpec, RopeSpec

# rope type -> the numbers it cannot do without
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")


class Fields:
    """Checked access to a config's fields."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where it is missing or null."""
        value = self.config.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {name} must be a positive integer, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)):
            raise CheckpointError(f"config.json: {name} must be a number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} must be true or false, got {value!r}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.get(name, ())
        return (value,) if isinstance(value, int) else tuple(value)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """See ModelSpec.from_hf."""
    fields = Fields(config)
    architectures = fields.get("architectures", ())
    known = [name for name in architectures if name in ARCHITECTURES]
    if not known:
        named = ", ".join(map(repr, architectures)) or "none (config.json names no architectures)"
        raise Unsupported(f"unknown architecture {named}; known: {', '.join(sorted(ARCHITECTURES))}")
    if (quantized := fields.get("quantization_config")) is not None:
        raise Unsupported(f"checkpoints quantized by {quantized.get('quant_method')!r} cannot be read; known: unquantized ones")
    if (activation := fields.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise Unsupported(f"unknown hidden_act {activation!r}; known: silu")
    return ModelSpec(architecture=known[0], **_common(fields) | ARCHITECTURES[known[0]](fields))


def _common(fields: Fields) -> dict[str, Any]:
    """What every family spells alike."""
    hidden, num_heads, num_layers = (fields.count(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = fields.count("head_dim", hidden // num_heads)
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"config.json: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly")
    rope, max_position = read_rope(fields, head_dim)
    return {
        "num_layers": num_layers,
        "hidden": hidden,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "ffn": fields.count("intermediate_size"),
        "vocab": fields.count("vocab_size"),
        "max_position": max_position,
        "dtype": _dtype(fields),
        "rope": rope,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings"),
        "windows": (None,) * num_layers,
        "eos_token_ids": fields.token_ids("eos_token_id"),
        "bos_token_id": fields.get("bos_token_id"),
    }


def _dtype(fields: Fields) -> str:
    name = str(fields.get("dtype", fields.get("torch_dtype", "float32"))).removeprefix("torch.")
    if name not in DTYPES:
        raise Unsupported(f"unknown dtype {name!r} in config.json; known: {', '.join(DTYPES)}")
    return name


def read_rope(fields: Fields, head_dim: int, interleaved: bool = False) -> tuple[RopeSpec, int]:
    """The rotary embedding of heads of `head_dim` rotated channels, and the longest context it reaches."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope = Fields(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise Unsupported("rope_parameters per layer type are not known; known: one set for all layers")
    if kind not in ROPE_TYPES:
        raise Unsupported(f"unknown rope type {kind!r}; known: {', '.join(ROPE_TYPES)}")
    max_position = fields.count("max_position_embeddings", 2048)
    original = fields.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", max_position))
    if kind == "yarn" and rope.get("factor") is None:
        rope = Fields({**raw, "factor": max_position / original})
    parameters = {name: rope.number(name) for name in ROPE_TYPES[kind]}
    if kind == "yarn":
        parameters |= {name: rope.number(name) for name in _YARN_OPTIONS if rope.get(name) is not None}
    reach = max_position
    if kind in ("linear", "dynamic"):
        parameters["original_max_position_embeddings"] = max_position
        reach = int(max_position * parameters["factor"])
    elif kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = original
        reach = int(original * parameters["factor"]) if kind == "yarn" else max_position
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)))
    if rotary_dim % 2:
        raise Unsupported(f"rotary embedding over {rotary_dim} channels of a head: the number must be even")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    return RopeSpec(theta, rotary_dim, interleaved, kind, parameters), reach


def _llama(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": fields.flag("mlp_bias")}


def _mistral(fields: Fields) -> dict[str, Any]:
    slides = fields.config.get("sliding_window", 4096) is not None  # null says none; a missing field is the first release's 4096
    window = fields.count("sliding_window", 4096) if slides else None
    return {"windows": (window,) * fields.count("num_hidden_layers")}


def _qwen2(fields: Fields) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": qwen_windows(fields)}


def _qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias")
    facts = {"qkv_bias": bias, "out_bias": bias, "qk_norm": True, "windows": qwen_windows(fields)}
    if fields.get("head_dim") is None:
        facts |= {"head_dim": 128, "rope": read_rope(fields, 128)[0]}
    return facts


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """Layers from max_window_layers on slide, or those that layer_types names; none unless use_sliding_window."""
    num_layers = fields.count("num_hidden_layers")
    if not fields.flag("use_sliding_window"):
        return (None,) * num_layers
    window, first = fields.count("sliding_window", 4096), fields.get("max_window_layers", 28)
    kinds = fields.get("layer_types", ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first))
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise Unsupported(f"unknown layer type {min(unknown)!r}; known: full_attention, sliding_attention")
    if len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# architecture -> what its config says beyond the common fields
ARCHITECTURES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
