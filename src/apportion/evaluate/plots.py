"""Plots of a report, from what its JSON holds: one PNG for each thing to see. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apportion.evaluate.report import Report

GREEN_TO_RED = "RdYlGn"


def plot(report: Report, folder: Path) -> list[Path]:
    """Write the plots of this report's task into `folder`; returns their paths."""
    drawn = PLOTS.get(report.task)
    return list(drawn(report, folder)) if drawn and report.cells else []


def _save(folder: Path, name: str, draw: Callable[[Axes], Any], size: tuple[float, float] = (6.4, 4.0)) -> Path:
    figure = Figure(figsize=size, layout="constrained")  # not pyplot: no display, no state between plots
    draw(figure.add_subplot())
    return _write(figure, folder, name)


def _write(figure: Figure, folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})  # the same report gives the same bytes
    return path


def _position(report: Report, folder: Path) -> Iterable[Path]:
    def draw(axes: Axes) -> None:
        axes.plot([cell["context_from"] for cell in report.cells], [cell["nll"] for cell in report.cells], marker="o")
        axes.set(xscale="log", xlabel="tokens before, in the window", ylabel="NLL (nat / token)", title=_title(report))

    yield _save(folder, "nll_by_position", draw)


def _divergence(report: Report, folder: Path) -> Iterable[Path]:
    def draw(axes: Axes) -> None:
        for name in dict.fromkeys(cell["model"] for cell in report.cells):
            cells = [cell for cell in report.cells if cell["model"] == name]
            axes.plot([max(cell["kl"], 1e-12) for cell in cells], [cell["quantile"] for cell in cells], marker="o", label=name)
        axes.set(xscale="log", xlabel="KL(reference || model) of a position (nat)", ylabel="positions below", title=_title(report))
        axes.legend()

    yield _save(folder, "kl_quantiles", draw)


def _heat_maps(report: Report, folder: Path) -> Iterable[Path]:
    """One panel a task: length across, depth down, accuracy as colour and number."""
    tasks = list(dict.fromkeys(cell["task"] for cell in report.cells))
    lengths, depths = (sorted({cell[name] for cell in report.cells}) for name in ("length", "depth"))
    figure = Figure(figsize=(1.6 + max(2.4, 0.75 * len(lengths)) * len(tasks), 1.4 + 0.45 * len(depths)), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        right = {(cell["depth"], cell["length"]): cell["value"] for cell in report.cells if cell["task"] == task}
        image = axes.imshow(
            [[right[depth, length] for length in lengths] for depth in depths], cmap=GREEN_TO_RED, vmin=0, vmax=1, aspect="auto"
        )
        for (depth, length), value in right.items():
            ink = "white" if abs(value - 0.5) > 0.4 else "black"  # on the dark ends of the colours
            axes.text(lengths.index(length), depths.index(depth), f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set(title=task, xlabel="length (tokens)", ylabel="depth")
    figure.colorbar(image, ax=figure.axes, label="answered")
    figure.suptitle(_title(report))
    yield _write(figure, folder, "retrieval")


def _drift(report: Report, folder: Path) -> Iterable[Path]:
    def draw(axes: Axes) -> None:
        for name in dict.fromkeys(cell["text_of"] for cell in report.cells):
            cells = [cell for cell in report.cells if cell["text_of"] == name]
            axes.plot([cell["position"] for cell in cells], [cell["nll"] for cell in cells], marker="o", label=f"text of the {name}")
        axes.set(xlabel="position in the output (tokens)", ylabel="NLL under the judge (nat / token)", title=_title(report))
        axes.legend()

    yield _save(folder, "judged_nll", draw)


def _kept(report: Report, folder: Path) -> Iterable[Path]:
    def draw(axes: Axes) -> None:
        for place, cell in enumerate(report.cells):
            for shift, (name, colour) in enumerate((("score_original", "tab:gray"), ("score", "tab:blue"))):
                score = cell[name]
                spread = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
                label = name.replace("_", " of the ") if place == 0 else None
                axes.bar(place + 0.4 * shift - 0.2, score["value"], 0.38, yerr=spread, color=colour, capsize=3, label=label)
        axes.set_xticks(range(len(report.cells)), [cell["task"] for cell in report.cells])
        axes.set(ylim=(0, 1.05), ylabel="answered", title=_title(report))
        axes.legend()

    yield _save(folder, "recovery", draw)


def _title(report: Report) -> str:
    return f"{report.task}: {Path(report.subject['model']).name}"


PLOTS: dict[str, Callable[[Report, Path], Iterable[Path]]] = {
    "ppl": _position,
    "compare": _divergence,
    "retrieval": _heat_maps,
    "generate": _drift,
    "recovery": _kept,
}
