"""How the numbers of a projection are stored, multiplied and found in a checkpoint: one record per projection, by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from apportion.kernels.ops import QuantizedWeight


class Layout(Protocol):
    """How a checkpoint stores one matrix in several tensors. `name`: of the projection, without a suffix."""

    def tensors(self, name: str, shape: tuple[int, int], present: Collection[str]) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The tensors of the projection, with the shapes that each may have; `present`: all names that the checkpoint has."""

    def assemble(self, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor | QuantizedWeight:
        """The matrix they hold. Errors: CheckpointError naming the tensor that makes no sense."""


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """scheme: what the product uses (core/number_format). layout: of the checkpoint, None for one floating-point tensor `weight`.

    The two may differ: a floating-point tensor is quantized as it is loaded, a quantized one widened where the product needs it.
    """

    scheme: str
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """The record of the projections that `pattern` (a regular expression, from the start of the name) or, without one, `kind` describes."""

    record: LinearRecord
    pattern: str = ""
    kind: str = ""  # "Linear" or "Embedding"

    def applies(self, name: str, kind: str) -> bool:
        return (not self.kind or self.kind == kind) and re.match(self.pattern, name) is not None


@dataclass(frozen=True, slots=True)
class LinearRecords:
    """A record for every projection: that of the first rule that applies, else plain `dtype`. Names are those of the checkpoint.

    spellings: (pattern, replacement) by which a quantization section may call a projection otherwise. kv_cache_dtype: the cache that the
    checkpoint was made for, None where it says nothing.
    """

    dtype: str
    rules: tuple[Rule, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    kv_cache_dtype: str | None = None

    def of(self, name: str, kind: str = "Linear") -> LinearRecord:
        names = [name, *(re.sub(pattern, replacement, name) for pattern, replacement in self.spellings if re.search(pattern, name))]
        for rule in self.rules:
            if any(rule.applies(spelt, kind) for spelt in names):
                return rule.record
        return LinearRecord(self.dtype)

    def without_layouts(self) -> LinearRecords:
        """The same schemes, every matrix to be quantized from floating point."""
        rules = tuple(Rule(LinearRecord(rule.record.scheme), rule.pattern, rule.kind) for rule in self.rules)
        return LinearRecords(self.dtype, rules, self.spellings)

    def widened(self, dtype: str) -> LinearRecords:
        """The same layouts, every product in floating point."""
        rules = tuple(Rule(LinearRecord(dtype, rule.record.layout), rule.pattern, rule.kind) for rule in self.rules)
        return LinearRecords(dtype, rules, self.spellings)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, layouts left out: enough to map weights that are packed already."""
        rules = [[rule.record.scheme, rule.pattern, rule.kind] for rule in self.rules]
        return {"dtype": self.dtype, "rules": rules, "spellings": [list(pair) for pair in self.spellings]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LinearRecords:
        rules = tuple(Rule(LinearRecord(scheme), pattern, kind) for scheme, pattern, kind in data["rules"])
        return cls(data["dtype"], rules, tuple((pattern, replacement) for pattern, replacement in data["spellings"]))
