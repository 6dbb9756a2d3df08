"""How the numbers of a projection are stored and multiplied: one record per projection, found by its checkpoint name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from apportion.core.errors import Unsupported


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """dtype: of the packed weight. The scheme 'none' keeps the checkpoint's numbers, rounded to it."""

    dtype: str
    scheme: str = "none"


@dataclass(frozen=True, slots=True)
class LinearRecords:
    """A record for every projection: `default`, except where `by_name` says otherwise (names as in the checkpoint, without '.weight')."""

    default: LinearRecord
    by_name: Mapping[str, LinearRecord] = field(default_factory=dict)

    @classmethod
    def unquantized(cls, dtype: str) -> LinearRecords:
        """Every matrix in `dtype`, a float type."""
        return cls(LinearRecord(dtype))

    def of(self, *names: str) -> LinearRecord:
        """The record of projections that are merged into one product. Errors: Unsupported when theirs differ."""
        first, *others = (self.by_name.get(name, self.default) for name in names)
        if any(other != first for other in others):
            raise Unsupported(f"{', '.join(names)} are multiplied as one matrix and need one format, but their records differ")
        return first
