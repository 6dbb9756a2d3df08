"""Plots of serving results as PNG, one curve a result: latency distributions, load over time, time to first token by prompt length."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 144


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one appearance; `series` is cycled over results. They are the report page's own."""

    ink: str
    faint: str
    grid: str
    bad: str
    series: tuple[str, ...]


LIGHT = Theme("#1d2322", "#6b7573", "#e3e7e5", "#b3392b", ("#1f6f5c", "#b7741b", "#4a69a8", "#8a4a86", "#5d6b2f", "#a1553b"))
DARK = Theme("#e6eae8", "#8f9a97", "#2b3331", "#f08373", ("#6fc9ae", "#e0a458", "#8fabe6", "#cf93cb", "#adbd72", "#dc937a"))
PANELS = {"ttft": "Time to first token", "tpot": "Time per output token", "itl": "Gap between chunks", "e2el": "End to end"}


def draw(results: Sequence[dict[str, Any]], theme: Theme) -> dict[str, bytes]:
    """PNG files by name, on a transparent ground. results: as `serving_metrics.summarise` makes them, with a "label" each."""
    import matplotlib

    settings = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "text.color": theme.ink,
        "axes.labelcolor": theme.faint,
        "axes.edgecolor": theme.grid,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.ink,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        figures = {"latency": _latency(results, theme), "timeline": _timeline(results, theme), "prompt_length": _scatter(results, theme)}
        return {name: _png(figure) for name, figure in figures.items()}


def _figure(width: float, height: float, rows: int, columns: int, **keywords: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, transparent=True)
    return buffer.getvalue()


def _colour(theme: Theme, i: int) -> str:
    return theme.series[i % len(theme.series)]


def _latency(results: Sequence[dict[str, Any]], theme: Theme) -> Figure:
    """The share of requests (ITL: of gaps) that took at most so long; dots at p50, p90 and p99; the objective dashed."""
    figure, axes = _figure(9.6, 5.2, 2, 2, sharey=True)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        curves = [result["curves"].get(name) for result in results]
        for i, curve in enumerate(curves):
            if curve is None:
                continue
            steps = len(curve) - 1
            shares = [100 * k / steps for k in range(steps + 1)]
            axis.plot(curve, shares, color=_colour(theme, i), linewidth=1.8, label=results[i]["label"])
            marks = [round(steps * q) for q in (0.5, 0.9, 0.99)]
            axis.plot([curve[k] for k in marks], [shares[k] for k in marks], "o", color=_colour(theme, i), markersize=3.5)
        known = [curve for curve in curves if curve]
        if any(curve[-1] > 20 * max(curve[len(curve) // 2], 0.01) for curve in known):
            axis.set_xscale("symlog", linthresh=max(1.0, min(curve[len(curve) // 2] for curve in known)))
        axis.set_xlim(left=0)
        for limit in {result.get("slo", {}).get(name) for result in results} - {None}:
            axis.axvline(limit, color=theme.bad, linewidth=1, linestyle=(0, (4, 3)))
        axis.set(title=title, ylim=(0, 102))
        axis.set_xlabel("ms", loc="right")
    for row in axes:
        row[0].set_ylabel("share (%)")
    _legend(axes[0][0], results)
    return figure


def _timeline(results: Sequence[dict[str, Any]], theme: Theme) -> Figure:
    figure, axes = _figure(9.6, 4.0, 2, 1, sharex=True)
    tokens, running = axes[0][0], axes[1][0]
    for i, result in enumerate(results):
        line = result["timeline"]
        seconds = [(k + 0.5) * line["seconds"] for k in range(len(line["in_flight"]))]
        rate = [n * result["tokens_per_chunk"] for n in line["chunks_per_s"]]
        for axis, values in ((tokens, rate), (running, line["in_flight"])):
            axis.plot(seconds, values, color=_colour(theme, i), linewidth=1.5, label=result["label"])
            if len(results) == 1:
                axis.fill_between(seconds, values, color=_colour(theme, i), alpha=0.12, linewidth=0)
        failed = [s for s, n in zip(seconds, line["failures"], strict=True) if n]
        running.plot(failed, [0] * len(failed), "x", color=theme.bad, markersize=6, clip_on=False)
    tokens.set(title="Output tokens per second", ylim=(0, None))
    running.set(title="Requests in flight (failures marked ×)", ylim=(0, None), xlim=(0, None))
    running.set_xlabel("seconds since the start", loc="right")
    _legend(tokens, results)
    return figure


def _scatter(results: Sequence[dict[str, Any]], theme: Theme) -> Figure:
    figure, axes = _figure(9.6, 3.2, 1, 1)
    axis: Axes = axes[0][0]
    for i, result in enumerate(results):
        points = result["scatter"]
        axis.plot(
            points["input_tokens"], points["ttft_ms"], "o", color=_colour(theme, i), markersize=3.5, alpha=0.55, label=result["label"]
        )
    axis.set(title="Time to first token by prompt length", xlim=(0, None), ylim=(0, None), ylabel="ms")
    axis.set_xlabel("prompt tokens", loc="right")
    _legend(axis, results)
    return figure


def _legend(axis: Axes, results: Sequence[dict[str, Any]]) -> None:
    if len(results) > 1:
        axis.legend(loc="best", fontsize=8)
