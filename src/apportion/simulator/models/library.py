"""Decoders by name or by a handful of numbers, for simulation alone: nothing here is a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import ModelSpec, RopeSpec
from apportion.simulator.fields import typed

NEEDED = ("num_layers", "hidden", "num_heads", "ffn", "vocab")
OPTIONAL = {"num_kv_heads": int, "head_dim": int, "dtype": str, "gated": bool, "tied": bool}


@cache
def _library() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((files("apportion.simulator.models") / "library.yaml").read_text(encoding="utf-8")))


def decoder(model: str | Mapping[str, Any]) -> tuple[ModelSpec, bool]:
    """(spec, gated) of a name of the library or of its numbers. Error: InvalidParameter for an unknown name or field."""
    if isinstance(model, str):
        if model not in _library():
            raise InvalidParameter(f"unknown model {model!r}; known: {', '.join(sorted(_library()))}, or a Hugging Face config.json")
        name, numbers = model, dict(_library()[model])
    else:
        name, numbers = "decoder", dict(model)
    typed(f"model {name!r}", numbers, dict.fromkeys(NEEDED, int) | OPTIONAL, needed=NEEDED)
    if min(numbers[field] for field in NEEDED) < 1:
        raise InvalidParameter(f"model {name!r} has a field below 1: {', '.join(NEEDED)} count something")
    gated = bool(numbers.pop("gated", True))
    heads, hidden, layers = numbers["num_heads"], numbers["hidden"], numbers["num_layers"]
    numbers = {"num_kv_heads": heads, "head_dim": hidden // heads, "dtype": "bfloat16", "tied": False} | numbers
    return ModelSpec(
        architecture=name, max_position=1 << 20, rope=RopeSpec(), norm_eps=1e-5, windows=(None,) * layers, **numbers
    ), gated  # fmt: skip
