"""Reads a ModelSpec from a Hugging Face config.json: transformers-5 style (`rope_parameters`, `dtype`) and older ones (`rope_theta`,
`rope_scaling`, `torch_dtype`). A missing field takes the default of the model's own transformers configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apportion.core.config import DTYPES
from apportion.core.errors import CheckpointError, Unsupported
from apportion.core.model_spec import LatentSpec, ModelSpec, MoeSpec, RopeSpec

# rope type -> the numbers it cannot do without
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_NAMES = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "truncate", "finetuned"}
_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


class Fields:
    """Checked access to a config's fields. A field that is missing or null takes the default. Errors: CheckpointError naming the field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def get(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._wrong(name, "a positive integer" if least else "an integer, not negative", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._wrong(name, "a positive number", value)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        """Integers, or one alone."""
        value = self.get(name, [])
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            raise self._wrong(name, "integers, not negative", value)
        return tuple(values)

    def words(self, name: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        value = self.get(name, default)
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
            raise self._wrong(name, "a list of names", value)
        return tuple(value)

    def part(self, name: str) -> Mapping[str, Any]:
        """An object; empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object", value)
        return value

    @staticmethod
    def _wrong(name: str, meaning: str, value: Any) -> CheckpointError:
        return CheckpointError(f"config.json: {name} must be {meaning}, got {value!r}")


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """See ModelSpec.from_hf."""
    fields = Fields(config)
    architectures = fields.words("architectures")
    known = [name for name in architectures if name in ARCHITECTURES]
    if not known:
        named = ", ".join(map(repr, architectures)) or "none (config.json names no architectures)"
        raise Unsupported(f"unknown architecture {named}; known: {', '.join(sorted(ARCHITECTURES))}")
    if (activation := fields.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise Unsupported(f"unknown hidden_act {activation!r}; known: silu")
    fields = Fields({**DEFAULTS.get(known[0], {}), **config})
    spec = ModelSpec(architecture=known[0], **_common(fields) | ARCHITECTURES[known[0]](fields))
    if spec.moe is not None and spec.moe.top_k > spec.moe.num_experts:
        raise CheckpointError(f"config.json: a token cannot go to {spec.moe.top_k} of {spec.moe.num_experts} experts")
    return spec


def _common(fields: Fields) -> dict[str, Any]:
    """What every family spells alike."""
    hidden, num_heads, num_layers = (fields.count(n) for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = fields.count("head_dim", fields.get("qk_rope_head_dim", hidden // num_heads))
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
        "eos_token_ids": fields.numbers("eos_token_id"),
        "bos_token_id": next(iter(fields.numbers("bos_token_id")), None),
    }


def _dtype(fields: Fields) -> str:
    name = str(fields.get("dtype", fields.get("torch_dtype", "float32"))).removeprefix("torch.")
    if name not in DTYPES:
        raise Unsupported(f"unknown dtype {name!r} in config.json; known: {', '.join(DTYPES)}")
    return name


def read_rope(fields: Fields, head_dim: int, interleaved: bool = False) -> tuple[RopeSpec, int]:
    """The rotary embedding of heads of `head_dim` rotated channels, and the longest context it reaches."""
    raw = fields.part("rope_parameters") or fields.part("rope_scaling")
    rope = Fields(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise Unsupported("rope_parameters per layer type are not known; known: one set for all layers")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise Unsupported(f"unknown rope type {kind!r}; known: {', '.join(ROPE_TYPES)}")
    if unknown := raw.keys() - _ROPE_NAMES - {*_YARN_OPTIONS}.union(*ROPE_TYPES.values()):
        raise Unsupported(f"unknown rope parameter {min(unknown)!r} of type {kind!r}")
    max_position = fields.count("max_position_embeddings", 2048)
    original = fields.count("original_max_position_embeddings", rope.count("original_max_position_embeddings", max_position))
    if kind == "yarn" and rope.get("factor") is None:
        rope = Fields({**raw, "factor": max_position / original})
    parameters = {name: rope.number(name) for name in ROPE_TYPES[kind]}
    if kind == "yarn":
        parameters |= {name: rope.number(name) for name in _YARN_OPTIONS if rope.get(name, 0) != 0}  # 0: as if it were missing
        parameters["truncate"] = float(rope.flag("truncate", True))
    reach = max_position
    if kind in ("linear", "dynamic"):
        parameters["original_max_position_embeddings"] = max_position
        reach = int(max_position * parameters["factor"])
    elif kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = original
        reach = int(original * parameters["factor"]) if kind == "yarn" else max_position
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)))
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise Unsupported(f"rotary embedding over {rotary_dim} channels of heads of {head_dim}: the number must be even and fit")
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


def _mixtral(fields: Fields) -> dict[str, Any]:
    window = fields.count("sliding_window") if fields.get("sliding_window") is not None else None
    num_layers = fields.count("num_hidden_layers")
    moe = MoeSpec(
        num_experts=_num_experts(fields, 8),
        top_k=fields.count("num_experts_per_tok", 2),
        ffn=fields.count("intermediate_size"),
        layers=tuple(range(num_layers)),
    )
    return {"windows": (window,) * num_layers, "moe": moe}


def _qwen2_moe(fields: Fields) -> dict[str, Any]:
    num_layers, first = fields.count("num_hidden_layers"), fields.count("max_window_layers", 28, least=0)
    kinds = ["sliding_attention" if i % 2 == 0 and i < first else "full_attention" for i in range(num_layers)]
    shared = {"num_shared": 1, "shared_ffn": fields.count("shared_expert_intermediate_size", 5632), "shared_gate": True}
    return {
        "qkv_bias": fields.flag("qkv_bias", True),
        "windows": qwen_windows(fields, kinds),
        "moe": _qwen_mixture(fields, 60, 4, 1408, **shared),
    }


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    bias, num_layers = fields.flag("attention_bias"), fields.count("num_hidden_layers")
    windows = qwen_windows(fields, ["sliding_attention"] * num_layers)
    return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True, "windows": windows, "moe": _qwen_mixture(fields, 128, 8, 768)}


def _qwen_mixture(fields: Fields, num_experts: int, top_k: int, ffn: int, **shared: Any) -> MoeSpec | None:
    """Every decoder_sparse_step-th layer is a mixture, but for those in mlp_only_layers."""
    step, dense = fields.count("decoder_sparse_step", 1), fields.numbers("mlp_only_layers")
    layers = tuple(i for i in range(fields.count("num_hidden_layers")) if i not in dense and (i + 1) % step == 0)
    if not layers:
        return None
    return MoeSpec(
        num_experts=_num_experts(fields, num_experts),
        top_k=fields.count("num_experts_per_tok", top_k),
        ffn=fields.count("moe_intermediate_size", ffn),
        layers=layers,
        renormalize=fields.flag("norm_topk_prob"),
        **shared,
    )


def _num_experts(fields: Fields, default: int) -> int:
    """transformers 5 writes num_local_experts where published Qwen configs have num_experts."""
    return fields.count("num_experts", fields.get("num_local_experts", default))


def _deepseek_v2(fields: Fields) -> dict[str, Any]:
    q_lora = fields.count("q_lora_rank") if fields.config.get("q_lora_rank", 1536) is not None else 0
    latent = LatentSpec(
        kv_lora_rank=fields.count("kv_lora_rank"),
        q_lora_rank=q_lora,
        qk_nope_dim=fields.count("qk_nope_head_dim"),
        qk_rope_dim=fields.count("qk_rope_head_dim"),
        v_dim=fields.count("v_head_dim"),
    )
    bias = fields.flag("attention_bias")
    return {
        "head_dim": latent.qk_nope_dim + latent.qk_rope_dim,
        "num_kv_heads": fields.count("num_attention_heads"),
        "rope": read_rope(fields, latent.qk_rope_dim, interleaved=True)[0],
        "latent": latent,
        "moe": _deepseek_mixture(fields),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": fields.flag("mlp_bias"),
    }


def _deepseek_mixture(fields: Fields) -> MoeSpec | None:
    """Layers from first_k_dense_replace on. The two routing methods that DeepSeek-V2 was published with."""
    method, scoring = fields.get("topk_method", "greedy"), fields.get("scoring_func", "softmax")
    if method not in ("greedy", "group_limited_greedy"):
        raise Unsupported(f"unknown topk_method {method!r}; known: greedy, group_limited_greedy")
    if scoring != "softmax":
        raise Unsupported(f"unknown scoring_func {scoring!r} of DeepSeek-V2; known: softmax")
    if fields.flag("norm_topk_prob"):
        raise Unsupported("norm_topk_prob of DeepSeek-V2 is not known: its own code and transformers disagree about it")
    step = fields.count("moe_layer_freq", 1)
    layers = tuple(i for i in range(fields.count("first_k_dense_replace", 0, least=0), fields.count("num_hidden_layers")) if i % step == 0)
    if fields.get("n_routed_experts") is None or not layers:
        return None
    num_experts, ffn = fields.count("n_routed_experts"), fields.count("moe_intermediate_size")
    num_shared = fields.count("n_shared_experts", 0, least=0)
    num_groups, top_groups = (fields.count("n_group"), fields.count("topk_group")) if method == "group_limited_greedy" else (1, 1)
    if num_experts % num_groups or top_groups > num_groups:
        raise CheckpointError(f"config.json: {num_experts} experts do not form {num_groups} groups of which {top_groups} are chosen")
    return MoeSpec(
        num_experts=num_experts,
        top_k=fields.count("num_experts_per_tok"),
        ffn=ffn,
        layers=layers,
        num_shared=num_shared,
        shared_ffn=num_shared * ffn,
        renormalize=False,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=fields.number("routed_scaling_factor", 1.0),
    )


def qwen_windows(fields: Fields, default_kinds: list[str] | None = None) -> tuple[int | None, ...]:
    """Layers from max_window_layers on slide, or those that layer_types names; none unless use_sliding_window."""
    num_layers = fields.count("num_hidden_layers")
    if not fields.flag("use_sliding_window"):
        return (None,) * num_layers
    window, first = fields.count("sliding_window", 4096), fields.count("max_window_layers", 28, least=0)
    later = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first)
    kinds = fields.words("layer_types", default_kinds or later)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise Unsupported(f"unknown layer type {min(unknown)!r}; known: full_attention, sliding_attention")
    if len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# architecture -> fields that a config may leave out and whose defaults differ from those of most families
DEFAULTS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8},
    "DeepseekV2ForCausalLM": {
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
        "n_shared_experts": 2, "moe_intermediate_size": 1407,
    },
}  # fmt: skip

# architecture -> what its config says beyond the common fields
ARCHITECTURES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV2ForCausalLM": _deepseek_v2,
}
