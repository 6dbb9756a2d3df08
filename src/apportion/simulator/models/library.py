"""Decoders by name or by a handful of numbers, for simulation alone: nothing here is a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import ModelSpec, RopeSpec

NEEDED = ("num_layers", "hidden", "num_heads", "ffn", "vocab")
OPTIONAL = ("num_kv_heads", "head_dim", "dtype", "gated", "tied")


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
    if unknown := set(numbers) - {*NEEDED, *OPTIONAL}:
        raise InvalidParameter(f"a model has no field {sorted(unknown)[0]!r}; known: {', '.join((*NEEDED, *OPTIONAL))}")
    if missing := [field for field in NEEDED if field not in numbers]:
        raise InvalidParameter(f"model {name!r} needs the field {missing[0]!r}")
    gated = bool(numbers.pop("gated", True))
    heads, hidden, layers = numbers["num_heads"], numbers["hidden"], numbers["num_layers"]
    numbers = {"num_kv_heads": heads, "head_dim": hidden // heads, "dtype": "bfloat16", "tied": False} | numbers
    return ModelSpec(
        architecture=name, max_position=1 << 20, rope=RopeSpec(), norm_eps=1e-5, windows=(None,) * layers, **numbers
    ), gated  # fmt: skip
