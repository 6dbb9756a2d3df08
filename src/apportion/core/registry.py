"""A table of names, each resolved to an object only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Generic, TypeVar

from apportion.core.errors import Unsupported

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to 'package.module:attribute', imported at the first `get`.

    Errors: `Unsupported` with the known names when a name is not in the table.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> T:
        try:
            module, _, attribute = self._entries[name].partition(":")
        except KeyError:
            known = ", ".join(sorted(self._entries))
            raise Unsupported(f"unknown {self.kind} {name!r}; known: {known}") from None
        found: T = getattr(importlib.import_module(module), attribute)
        return found
