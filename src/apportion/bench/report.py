"""Serving results to read: a table in the terminal, PNG plots, and one HTML file that asks nothing of the network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from apportion.assets import REPORT_CSS
from apportion.bench.serving_metrics import METRICS
from apportion.core.errors import InvalidParameter

if TYPE_CHECKING:
    from rich.console import Console

TEMPLATE = Path(__file__).parent / "report.html.jinja"
LOAD_KEYS = ("dataset_name", "num_prompts", "request_rate", "burstiness", "max_concurrency", "num_warmups", "seed")


def read_result(path: Path) -> dict[str, Any]:
    """A result that `bench serve` wrote. Errors: InvalidParameter."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidParameter(f"{path} cannot be read: {error}") from None
    if not isinstance(result, dict) or "curves" not in result:
        raise InvalidParameter(f"{path} is no result of `apportion bench serve`")
    return result | {"label": result.get("label") or path.parent.name}


def percentile_words(result: dict[str, Any]) -> list[str]:
    """['p50', 'p90', 'p99'], whatever the run was asked for."""
    return [key.removesuffix("_ttft_ms") for key in result if key.startswith("p") and key.endswith("_ttft_ms")]


def number(value: float | None) -> str:
    """Three significant digits or all of the whole part: 0.123, 4.56, 78.9, 1234."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) lines: what happened, what it came to, and what the client had to do with it."""
    rows = [
        ("requests", f"{result['completed']} answered, {result['failed']} failed, in {result['duration']:.1f} s"),
        ("prompt tokens", f"{result['total_input_tokens']:,} ({result['requested_input_tokens']:,} asked for)"),
        ("output tokens", f"{result['total_output_tokens']:,} ({result['requested_output_tokens']:,} asked for)"),
        ("throughput", f"{number(result['request_throughput'])} requests/s, {number(result['output_throughput'])} output tokens/s"),
        ("in flight at most", str(result["max_concurrent_requests"])),
    ]
    if "slo" in result:
        good = f"{number(result['request_goodput'])} requests/s; {100 * result['slo_attainment']:.1f} % of those sent were good"
        rows.append(("goodput", f"{good} ({', '.join(f'{METRICS[k]} <= {v:g} ms' for k, v in result['slo'].items())})"))
    rows.append(
        ("client", f"{100 * result['client_cpu_share']:.1f} % of a core, {result['client_cpu_us_per_chunk']:.0f} µs a chunk of tokens")
    )
    for name, process in result.get("server_cpu", {}).items():
        share, per_token = 100 * process["cpu_s"] / result["duration"], process["cpu_us_per_token"]
        rows.append((f"server: {name}", f"{share:.1f} % of a core, {per_token:.0f} µs an output token"))
    return rows


def warnings(result: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    if result["failed"]:
        found += [f"{count} failed: {error}" for error, count in result["errors_by_kind"].items()]
    if result.get("num_too_long"):
        found.append(f"{result['num_too_long']} requests of the trace were too long and left out")
    if result["without_usage"]:
        found.append(f"{result['without_usage']} answers came without usage: their chunks are counted as tokens")
    if result["total_output_tokens"] < 0.98 * result["requested_output_tokens"]:
        found.append("answers were shorter than asked for: the server ended them early")
    if (lag := result["max_lag_ms"] or 0) > 20:
        found.append(f"requests were sent up to {number(lag)} ms late: all places were taken, or the client was too busy")
    if result["tokens_per_chunk"] > 1.05:
        found.append(f"a chunk brought {result['tokens_per_chunk']:.2f} tokens on average: ITL is of chunks, TPOT of tokens")
    return found


def print_result(result: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    for name, value in headline(result):
        console.print(f"{name:18} {value}", markup=False, highlight=False)
    table = Table("ms", *(["mean", *percentile_words(result), "max"]), box=None, pad_edge=False, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, title in METRICS.items():
        table.add_row(title, *(number(result[f"{word}_{name}_ms"]) for word in ["mean", *percentile_words(result), "max"]))
    console.print()
    console.print(table)
    for warning in warnings(result):
        console.print(f"note: {warning}", style="yellow", markup=False, highlight=False)


def draw_plots(results: Sequence[dict[str, Any]]) -> dict[str, tuple[bytes, bytes]]:
    """name -> (PNG for a light ground, PNG for a dark one)."""
    from apportion.bench.plots import DARK, LIGHT, draw

    light, dark = draw(results, LIGHT), draw(results, DARK)
    return {name: (light[name], dark[name]) for name in light}


def write_plots(plots: dict[str, tuple[bytes, bytes]], folder: Path) -> None:
    for name, (light, _) in plots.items():
        (folder / f"{name}.png").write_bytes(light)


def write_report(results: Sequence[dict[str, Any]], plots: dict[str, tuple[bytes, bytes]], path: Path) -> None:
    """One page over one result, or over several side by side; `plots` are theirs, and go into the page."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    page = template.render(
        css=Markup(REPORT_CSS.read_text(encoding="utf-8")),
        results=results,
        headlines=[dict(headline(result)) for result in results],
        warnings=[(result["label"], warning) for result in results for warning in warnings(result)],
        words=["mean", *percentile_words(results[0]), "max"],
        metrics=METRICS,
        load_keys=LOAD_KEYS,
        number=number,
        plots={name: (_data_uri(light), _data_uri(dark)) for name, (light, dark) in plots.items()},
    )
    path.write_text(page, encoding="utf-8")


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
