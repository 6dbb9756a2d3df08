"""Measured choices among the implementations of a linear: for each format and shape, intervals of tokens and what won in them.

One JSON file for each device in kernels/tables/dispatch, written by `apportion profile --linear` on a CPU and `python3 scripts/gpu linear`
on a GPU. A shape without a row has no choice: who asks takes what it has for all, and says so once.
"""

from __future__ import annotations

import json
import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from apportion.core.errors import InvalidParameter

logger = logging.getLogger(__name__)

FORMAT = "apportion linear dispatch 1"
NOISE = 0.03  # of the time: a smaller win over the usual choice is none
SWITCH = 0.05  # of the time of one cell: what a change of choice must gain in all


@dataclass(frozen=True, slots=True)
class Choice:
    """kernel: 'library', 'gemv' or 'flat', the last on a GPU with an index into the tiles and a number of splits."""

    kernel: str
    tile: int = 0
    splits: int = 1

    def __str__(self) -> str:
        return self.kernel if (self.tile, self.splits) == (0, 1) else f"{self.kernel} (tile {self.tile}, {self.splits} splits)"


LIBRARY, FLAT, GEMV = Choice("library"), Choice("flat"), Choice("gemv")


@dataclass(frozen=True, slots=True)
class Intervals:
    """choices[i] holds from breaks[i] tokens on, to breaks[i + 1]; breaks[0] is 1. us: {tokens: {what was measured: microseconds}}."""

    breaks: tuple[int, ...]
    choices: tuple[Choice, ...]
    us: Mapping[str, Mapping[str, float]]

    def at(self, num_tokens: int) -> Choice:
        return self.choices[bisect_right(self.breaks, num_tokens) - 1]

    @classmethod
    def of(
        cls,
        measured: Sequence[tuple[int, float, float, Choice]],
        usual: Choice = LIBRARY,
        peers: Mapping[int, Mapping[str, float]] | None = None,
    ) -> Intervals:
        """From (tokens, microseconds of the usual choice, of the best other, that other), tokens rising; the usual one beyond the last.

        A win must exceed the noise. peers: tokens -> times that are kept beside and never chosen. Errors: InvalidParameter where nothing
        was measured.
        """
        if not measured:
            raise InvalidParameter("a table of intervals needs at least one measurement")
        breaks, choices, us = [], [], {}
        for tokens, known, other, choice in measured:
            us[str(tokens)] = {usual.kernel: known} | {choice.kernel: other} | dict((peers or {}).get(tokens, {}))
            best = choice if other < known * (1 - NOISE) else usual
            if not choices or choices[-1] != best:
                breaks.append(tokens if breaks else 1)
                choices.append(best)
        if choices[-1] != usual:
            breaks.append(measured[-1][0] + 1)
            choices.append(usual)
        return cls(tuple(breaks), tuple(choices), us)

    @classmethod
    def fitted(cls, us: Mapping[int, Mapping[str, float]], one: Choice, usual: Choice) -> Intervals:
        """Where `one` holds and where `usual`, which holds beyond the last: the intervals that lose least over all measured cells, when
        each change of choice costs as much as SWITCH in one cell.

        So a disturbed cell moves nothing unless it outweighs its neighbours, and what is chosen instead of the best costs at most SWITCH
        at an end and twice that between. us: {tokens: {kernel or peer: microseconds}}; `one` may lack where it cannot run.
        Errors: InvalidParameter where nothing was measured.
        """
        if not us:
            raise InvalidParameter("a table of intervals needs at least one measurement")
        known = sorted(us)
        best: list[tuple[float, list[Choice]]] = [(0.0, [usual])]  # (loss, choices) from a cell to the end, for each choice in that cell
        for tokens in reversed(known):
            spent = {choice: math.log(us[tokens].get(choice.kernel, math.inf)) for choice in (usual, one)}
            ways = {
                choice: [(loss + SWITCH * (rest[0] != choice) + own, [choice, *rest]) for loss, rest in best]
                for choice, own in spent.items()
            }
            best = [min(found, key=_loss) for found in ways.values()]
        chosen = min(best, key=_loss)[1]
        breaks, choices = [1], [chosen[0]]
        for before, tokens, choice in zip(known, known[1:], chosen[1:], strict=False):
            if choice != choices[-1]:
                breaks.append(before + 1 if choice == usual else tokens)
                choices.append(choice)
        if choices[-1] != usual:
            breaks.append(known[-1] + 1)
            choices.append(usual)
        return cls(tuple(breaks), tuple(choices), {str(tokens): us[tokens] for tokens in known})


def _loss(way: tuple[float, list[Choice]]) -> float:
    return way[0]


@dataclass(frozen=True, slots=True)
class IntervalTable:
    """rows: (scheme, out_features, in_features) -> Intervals. versions: of the libraries that it was measured with."""

    device: str
    versions: Mapping[str, str]
    rows: Mapping[tuple[str, int, int], Intervals]
    otherwise: str = "the library multiplies"  # a shape without a row

    def explain(self, scheme: str, n: int, c: int, num_tokens: int) -> str:
        """The measured row of a product, in words."""
        found = self.rows.get((scheme, n, c))
        if found is None:
            return f"{scheme} {n} x {c} was not measured on {self.device}: {self.otherwise}"
        nearest = min(found.us, key=lambda tokens: abs(int(tokens) - num_tokens))
        times = ", ".join(f"{name} {us:.1f} us" for name, us in found.us[nearest].items())
        return f"{scheme} {n} x {c} at {num_tokens} tokens: {found.at(num_tokens)}; measured at {nearest} tokens on {self.device}: {times}"

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {
                "scheme": scheme, "n": n, "c": c, "breaks": list(row.breaks),
                "choices": [[choice.kernel, choice.tile, choice.splits] for choice in row.choices], "us": row.us,
            }
            for (scheme, n, c), row in self.rows.items()
        ]  # fmt: skip
        return {"format": FORMAT, "device": self.device, "versions": dict(self.versions), "rows": rows}

    def to_json(self) -> str:
        """A row on a line: a diff of two tables shows which shapes changed."""
        data = self.as_dict()
        rows = ",\n".join(json.dumps(row) for row in data.pop("rows"))
        return json.dumps(data)[:-1] + f', "rows": [\n{rows}\n]}}\n'

    def merged_over(self, older: Mapping[str, Any]) -> IntervalTable:
        """The rows of an older table of this device that were not measured again, then these."""
        kept = IntervalTable.from_dict(older, self.device).rows
        return replace(self, rows={**kept, **self.rows})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], device: str) -> IntervalTable:
        """Errors: InvalidParameter for another format, or for a table of another device."""
        if data.get("format") != FORMAT:
            raise InvalidParameter(f"a dispatch table has the format {FORMAT!r}, not {data.get('format')!r}")
        if data["device"] != device:
            raise InvalidParameter(
                f"a dispatch table of {data['device']} was given for {device}; measure with `apportion profile --linear`"
            )
        rows = {
            (row["scheme"], row["n"], row["c"]): Intervals(
                tuple(row["breaks"]), tuple(Choice(*choice) for choice in row["choices"]), row["us"]
            )
            for row in data["rows"]
        }
        return cls(device, data["versions"], rows)


def shipped_path(device: str) -> Path:
    return Path(str(files("apportion.kernels").joinpath(f"tables/dispatch/{device}.json")))


def shipped(device: str, versions: Mapping[str, str]) -> IntervalTable:
    """The table of `device` (a name as `device_slug` spells it), empty where none was measured; another version of a library is said."""
    path = shipped_path(device)
    if not path.is_file():
        return IntervalTable(device, versions, {})
    table = IntervalTable.from_dict(json.loads(path.read_text()), device)
    for name, version in versions.items():
        if table.versions.get(name) != version:
            logger.warning("the dispatch table of %s was measured with %s %s, this is %s", device, name, table.versions.get(name), version)
    return table


def device_slug(name: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200'."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
