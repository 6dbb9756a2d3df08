"""The quantization section of a config.json, read key by key: what is not understood is refused by name, never skipped."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from apportion.core.errors import CheckpointError, Unsupported


class Section:
    """A JSON object of a config. `path` names it in errors. Errors of all methods: Unsupported or CheckpointError, naming the key."""

    def __init__(self, data: Any, path: str) -> None:
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{path} must be an object, not {data!r}")
        self.path = path
        self._data = dict(data)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key; null counts as absent."""
        value = self._data.pop(key, None)
        return default if value is None else value

    def choice(self, key: str, known: Collection[Any], default: Any = None) -> Any:
        value = self.take(key, default)
        if value not in known:
            raise Unsupported(f"{self.path}.{key} is {value!r}; known: {', '.join(map(repr, known))}")
        return value

    def number(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self.path}.{key} must be an integer, not {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}.{key} must be true or false, not {value!r}")
        return value

    def words(self, key: str) -> list[str]:
        value = self.take(key, [])
        if not isinstance(value, list) or any(not isinstance(word, str) for word in value):
            raise CheckpointError(f"{self.path}.{key} must be a list of names, not {value!r}")
        return value

    def part(self, key: str) -> Section | None:
        value = self.take(key)
        return None if value is None else Section(value, f"{self.path}.{key}")

    def parts(self) -> list[tuple[str, Any]]:
        """Everything that has not been taken; takes it."""
        rest, self._data = list(self._data.items()), {}
        return rest

    def close(self, harmless: Iterable[str] = ()) -> None:
        """All that matters has been taken: whatever else says something must be one of `harmless`."""
        for key, value in self._data.items():
            if key not in harmless and value is not None and value is not False and value != [] and value != {}:
                raise Unsupported(f"{self.path}.{key} = {value!r} is not understood")


def kv_cache_format(section: Section) -> str | None:
    """`kv_cache_scheme`: the KV format (core/kv_spec) that a checkpoint brings scales for (layers/kv_scales), None where it has none."""
    value = section.take("kv_cache_scheme")
    if value is None:
        return None
    if value == "static":  # AutoFP8 says no more
        return "fp8_e4m3"
    scheme = Section(value, f"{section.path}.kv_cache_scheme")
    scheme.choice("num_bits", (8,), 8)
    scheme.choice("type", ("float",), "float")
    scheme.choice("symmetric", (True,), True)
    scheme.choice("dynamic", (False,), False)
    scheme.choice("strategy", ("tensor", "attn_head"), "tensor")
    scheme.close(("observer", "observer_kwargs", "block_structure", "group_size", "actorder", "scale_dtype", "zp_dtype"))
    return "fp8_e4m3"


def names_pattern(names: Iterable[str]) -> str:
    """A regular expression of the projections that a list of skipped names means, '' for none.

    `re:` starts an expression that may match anywhere; other entries are whole names, their ends, or whole parts of them.
    """
    patterns = []
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise CheckpointError(f"{name!r} is no regular expression: {error}") from error
            patterns.append(f".*(?:{name[3:]})")
        else:
            patterns.append(rf"(?:.*\.)?{re.escape(name)}(?:\.|$)")
    return "|".join(f"(?:{pattern})" for pattern in patterns)
