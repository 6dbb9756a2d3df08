"""Measured times as tables, and what may be read out of them: a point itself, a point between points, or, said aloud, one beyond them.

A table is one JSON file of kernels/tables: times on a grid of axes, one grid for each key. What is interpolated is the logarithm of
(time / best possible time) over the logarithms of the axes, as that ratio changes little where the time itself changes a lot.
Knows numbers and their origin; nothing of operators or devices.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from apportion.core.errors import InvalidParameter

FORMAT = "apportion measured table 1"
REPEAT_SPREAD = 0.03  # of one kernel measured twice
EXTRAPOLATED_SPREAD = 0.25
US = 1e-6

Best = Callable[[Mapping[str, float]], float]  # a point -> seconds that no device of this kind can beat


@dataclass(frozen=True)
class Reading:
    """seconds of a point, how it was come by ('exact', 'interpolated', 'extrapolated'), and its relative spread."""

    seconds: float
    how: str
    spread: float


@dataclass(frozen=True)
class Table:
    """keys: names of what must be met exactly, or else as near as possible if `near`. axes: name -> rising values.

    rows: key -> times in seconds over the axes, row-major; None where nothing was measured. spread: of interpolation, from points that were
    left out.
    """

    op: str
    device: str
    dtype: str
    keys: tuple[str, ...]
    axes: tuple[tuple[str, tuple[float, ...]], ...]
    rows: Mapping[tuple[float, ...], Sequence[float | None]]
    spread: float
    near: bool
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def read(self, point: Mapping[str, float], best: Best) -> Reading | None:
        """None where no row has the key. Error: InvalidParameter for a point without an axis."""
        if missing := [name for name in (*self.keys, *dict(self.axes)) if name not in point]:
            raise InvalidParameter(f"a point of the table {self.op!r} needs {missing[0]!r}")
        wanted = tuple(float(point[name]) for name in self.keys)
        if wanted in self.rows:
            return self._in_row(wanted, point, best)
        if not self.near:
            return None
        row = min(self.rows, key=lambda r: _distance(r, wanted))
        there = self._in_row(row, {**point, **dict(zip(self.keys, row, strict=True))}, best)
        at = best({**point, **dict(zip(self.keys, row, strict=True))})
        return Reading(there.seconds / at * best(point), "extrapolated" if there.how == "extrapolated" else "interpolated", 2 * self.spread)

    def _in_row(self, row: tuple[float, ...], point: Mapping[str, float], best: Best) -> Reading:
        values = self.rows[row]
        around = [_bracket(grid, float(point[name])) for name, grid in self.axes]
        total = 0.0
        for corner in itertools.product(*((0, 1) if weight else (0,) for _, weight in (a or (0, 0.0) for a in around))):
            if None in around:
                return self._beyond(row, point, best)
            weight, place = 1.0, []
            for (low, share), side in zip([a for a in around if a], corner, strict=True):
                place.append(low + side)
                weight *= share if side else 1 - share
            seconds = values[self._index(place)]
            if seconds is None:
                return self._beyond(row, point, best)
            total += weight * math.log(seconds / best(self._point(row, place, point)))
        exact = all(a and not a[1] for a in around)
        if exact:
            return Reading(math.exp(total) * best(point), "exact", REPEAT_SPREAD)
        return Reading(math.exp(total) * best(point), "interpolated", self.spread)

    def _beyond(self, row: tuple[float, ...], point: Mapping[str, float], best: Best) -> Reading:
        """As far from the best possible as the nearest point that was measured."""
        logs = [math.log(max(1e-9, float(point[name]))) for name, _ in self.axes]

        def distance(place: Sequence[int]) -> float:
            return sum((math.log(grid[p]) - at) ** 2 for (_, grid), p, at in zip(self.axes, place, logs, strict=True))

        places = itertools.product(*(range(len(grid)) for _, grid in self.axes))
        known = [(place, seconds) for place, seconds in zip(places, self.rows[row], strict=True) if seconds is not None]
        place, seconds = min(known, key=lambda entry: distance(entry[0]))
        ratio = seconds / best(self._point(row, place, point))
        return Reading(ratio * best(point), "extrapolated", max(EXTRAPOLATED_SPREAD, 2 * self.spread))

    def _index(self, place: Sequence[int]) -> int:
        index = 0
        for (_, grid), p in zip(self.axes, place, strict=True):
            index = index * len(grid) + p
        return index

    def _point(self, row: tuple[float, ...], place: Sequence[int], point: Mapping[str, float]) -> dict[str, float]:
        axes = {name: grid[p] for (name, grid), p in zip(self.axes, place, strict=True)}
        return {**point, **dict(zip(self.keys, row, strict=True)), **axes}


def _bracket(grid: Sequence[float], value: float) -> tuple[int, float] | None:
    """(place below, share of the way to the next in logarithms), or None outside."""
    if not grid[0] <= value <= grid[-1]:
        return None
    low = max(i for i, at in enumerate(grid) if at <= value)
    if grid[low] == value:
        return low, 0.0
    return low, math.log(value / grid[low]) / math.log(grid[low + 1] / grid[low])


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(math.log(max(x, 1e-9) / max(y, 1e-9)) ** 2 for x, y in zip(a, b, strict=True))


def table_of(data: Mapping[str, Any]) -> Table:
    """A table from its JSON. Error: InvalidParameter for another format, a grid of the wrong size, or a row without a time."""
    if data.get("format") != FORMAT:
        raise InvalidParameter(f"a measured table has the format {FORMAT!r}, not {data.get('format')!r}")
    axes = tuple((name, tuple(map(float, grid))) for name, grid in data["axes"])
    size = math.prod(len(grid) for _, grid in axes)
    rows: dict[tuple[float, ...], list[float | None]] = {}
    for key, values in data["rows"]:
        if len(values) != size or not any(values):
            raise InvalidParameter(f"row {key} of the table {data['op']!r} has {len(values)} times for a grid of {size}")
        rows[tuple(map(float, key))] = [None if value is None else value * US for value in values]
    if any(list(grid) != sorted(set(grid)) for _, grid in axes):
        raise InvalidParameter(f"an axis of the table {data['op']!r} does not rise")
    return Table(
        data["op"], data["device"], data["dtype"], tuple(data["keys"]), axes, rows, float(data["spread"]), bool(data["near"]),
        data["source"], {k: v for k, v in data.items() if k not in ("rows", "axes")},
    )  # fmt: skip


@cache
def shipped() -> tuple[Table, ...]:
    """The tables of kernels/tables, by name."""
    folder = files("apportion") / "kernels" / "tables"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".json"))
    return tuple(table_of(json.loads((folder / name).read_text(encoding="utf-8"))) for name in names)
