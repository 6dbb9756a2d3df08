"""Values of a file, checked against the types of what they are for: dataclasses, functions, or fields listed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import isclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from apportion.core.errors import InvalidParameter

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", NoneType: "nothing"}


def typed(where: str, data: Any, types: type | Callable[..., Any] | Mapping[str, Any], needed: Iterable[str] = ()) -> dict[str, Any]:
    """data as keywords for `types`: a dataclass, a function, or field -> type. Error: InvalidParameter naming the field."""
    hints = dict(types) if isinstance(types, Mapping) else get_type_hints(types)
    hints.pop("return", None)
    if not isinstance(data, Mapping):
        raise InvalidParameter(f"{where} must be a mapping of fields, got {data!r}")
    if unknown := [name for name in data if name not in hints]:
        raise InvalidParameter(f"{where} has no field {unknown[0]!r}; known: {', '.join(hints)}")
    if missing := [name for name in needed if name not in data]:
        raise InvalidParameter(f"{where} needs the field {missing[0]!r}")
    for name, value in data.items():
        if not is_of(value, hints[name]):
            raise InvalidParameter(f"{name} of {where} must be {_words(hints[name])}, got {value!r}")
    return dict(data)


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value of a file can stand for a type. Numbers must be finite."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(is_of(value, one) for one in inner)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(is_of(k, inner[0]) and is_of(v, inner[1]) for k, v in value.items())
    if origin is not None and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            return False
        each = inner if origin is tuple and inner[-1] is not ... else (inner[0],) * len(value)
        return len(each) == len(value) and all(is_of(v, one) for v, one in zip(value, each, strict=True))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool) and math.isfinite(value)
    return isclass(hint) and isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in inner)
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping to {_words(inner[1])}" if inner[1] is not Any else "a mapping"
    if origin is not None and issubclass(origin, Sequence):
        if inner[0] is Any:
            return "a list"
        return (
            f"a list of {len(inner)}, each {_words(inner[0])}"
            if origin is tuple and inner[-1] is not ...
            else f"a list, each {_words(inner[0])}"
        )
    return WORDS.get(hint, str(hint))
