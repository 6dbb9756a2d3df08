"""What a quantization cost, as JSON and as a page to read: bytes, error by layer, tokens seen, loss where it was measured.

Plots are SVG inside the page, which needs no plotting library and asks nothing of the network.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from apportion.assets import REPORT_CSS

REPORT, PAGE = "quantization_report.json", "quantization_report.html"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 260, 58, 30, 10  # of a plot and its margins, in CSS pixels
LAYER = re.compile(r"\.layers\.(\d+)\.")

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plot:
    """Points over layers. ticks: (place, label). series: kind of projection -> (x, y, what it is), all in pixels from the upper left."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: dict[str, list[tuple[float, float, str]]]


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Both files. report: as quantize_checkpoint makes it, with or without an `evaluation` (the record of `apportion eval compare`)."""
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        report=report, css=Markup(REPORT_CSS.read_text(encoding="utf-8")), plots=list(plots(report["projections"])),
        kinds=kinds(report["projections"]), width=WIDTH, height=HEIGHT, left=LEFT, bottom=HEIGHT - BOTTOM, top=TOP,
    )  # fmt: skip
    (folder / PAGE).write_text(page, encoding="utf-8")


def kinds(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One row for each (kind of projection, scheme): how many, their numbers, their stored bytes, their mean error."""
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[_kind(entry), entry["scheme"]].append(entry)
    rows = []
    for (kind, scheme), found in groups.items():
        numbers, nbytes = sum(math.prod(e["shape"]) for e in found), sum(e["bytes"] for e in found)
        error = sum(e["relative_error"] for e in found) / len(found)
        rows.append({"kind": kind, "scheme": scheme, "count": len(found), "numbers": numbers, "bytes": nbytes, "error": error})
    return rows


def plots(entries: Sequence[Entry]) -> list[Plot]:
    """The error of each projection over layers, and the tokens it was calibrated on where these differ."""
    placed = [entry for entry in entries if LAYER.search(entry["name"])]
    found = [_over_layers("Relative error", placed, lambda e: e["relative_error"])] if placed else []
    if len({entry["num_tokens"] for entry in placed}) > 1:
        found.append(_over_layers("Calibration tokens", placed, lambda e: e["num_tokens"]))
    return found


def _over_layers(title: str, entries: Sequence[Entry], value: Callable[[Entry], float]) -> Plot:
    """Decades up; what is 0 stands on the floor."""
    layers = [int(LAYER.search(entry["name"])[1]) for entry in entries]  # type: ignore[index]
    positive = [value(entry) for entry in entries if value(entry) > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    last = max(*layers, 1)

    def x(layer: float) -> float:
        return round(LEFT + 12 + (WIDTH - LEFT - 24) * layer / last, 1)

    def y(number: float) -> float:
        share = (math.log10(number) - low) / (high - low) if number > 0 else 0.0
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share, 1)

    series: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for layer, entry in zip(layers, entries, strict=True):
        series[_kind(entry)].append((x(layer), y(value(entry)), f"{entry['name']}: {value(entry):.3g}"))
    step = max(1, math.ceil((last + 1) / 16))
    decades = range(low, high + 1, max(1, math.ceil((high - low) / 6)))
    return Plot(title, [(x(i), str(i)) for i in range(0, last + 1, step)], [(y(10.0**d), f"{10.0**d:g}") for d in decades], dict(series))


def _kind(entry: Entry) -> str:
    return str(entry["name"]).rpartition(".")[2]
