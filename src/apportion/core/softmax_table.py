"""Unified maxima of a model's attention heads (FlashDecoding++, arXiv:2311.01282, section 3), measured once and kept as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.core.errors import InvalidParameter

FORMAT = "apportion softmax 1"
BELOW, ABOVE = 60.0, 40.0  # base 2: how far the largest score of a row of at most 2^20 tokens may lie from phi, on any device


@dataclass(frozen=True, slots=True)
class SoftmaxTable:
    """model_hash: of the model it was measured on. num_tokens: of text.

    phi: layer -> one number for each query head, in base 2 (log2(e) times a scaled score); None: the head keeps its running maximum.
    expected: the share of rows that would have been computed again, alike, measured for every head.
    """

    model_hash: str
    num_tokens: int
    phi: Mapping[int, tuple[float | None, ...]]
    expected: Mapping[int, tuple[float, ...]]

    @property
    def num_enabled(self) -> int:
        return sum(phi is not None for heads in self.phi.values() for phi in heads)

    @property
    def num_heads(self) -> int:
        return sum(map(len, self.phi.values()))

    def write(self, path: Path) -> None:
        layers = [{"layer": layer, "phi": list(self.phi[layer]), "expected": list(self.expected[layer])} for layer in sorted(self.phi)]
        data = {"format": FORMAT, "model_hash": self.model_hash, "num_tokens": self.num_tokens, "layers": layers}
        path.write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> SoftmaxTable:
        """Errors: InvalidParameter naming the file."""
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise InvalidParameter(f"{path} has the format {data['format']!r}; a table of unified maxima has {FORMAT!r}")
            phi = {layer["layer"]: tuple(map(_number, layer["phi"])) for layer in data["layers"]}
            expected = {layer["layer"]: tuple(map(float, layer["expected"])) for layer in data["layers"]}
            return cls(data["model_hash"], data["num_tokens"], phi, expected)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidParameter(f"{path} is no table of unified maxima: {type(error).__name__}: {error}") from error

    def check(self, model_hash: str, num_layers: int, num_heads: int) -> None:
        """Errors: InvalidParameter where the table is another model's."""
        if self.model_hash != model_hash:
            raise InvalidParameter("the softmax table was measured on another model; measure this one with `apportion profile --softmax`")
        if set(self.phi) != set(range(num_layers)) or any(len(heads) != num_heads for heads in self.phi.values()):
            raise InvalidParameter(f"the softmax table does not fit {num_layers} layers of {num_heads} heads")


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"phi must be a finite number or null, got {value}")
    return float(value)
