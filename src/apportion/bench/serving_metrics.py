"""What a run against a server comes to: latencies, throughput, goodput. Definitions and key names are those of `vllm bench serve`.

TTFT: to the first chunk with tokens. E2EL: to the last chunk. TPOT: (E2EL - TTFT) / (output tokens - 1), one value a request of at
least two tokens. ITL: each gap between two chunks with tokens. One thing differs, on purpose: latencies count from the moment a
request was meant to be sent, not from the one at which the client got round to it; the lag between them stands beside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apportion.bench.serve import Record, Run
from apportion.core.errors import InvalidParameter

METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL", "lag": "send lag"}  # key -> how it is printed
NUM_QUANTILES = 201  # of the curves that plots are drawn from
MAX_POINTS = 240  # of the timeline


@dataclass(frozen=True, slots=True)
class Slo:
    """Most milliseconds a good request may take, by metric (ttft, tpot, e2el)."""

    limits: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """'ttft=200,tpot=50ms,e2el=10s' (vLLM's 'ttft:200' too); plain numbers are milliseconds. Errors: InvalidParameter."""
        limits = {}
        for part in filter(None, re.split(r"[,\s]+", text)):
            match = re.fullmatch(r"(ttft|tpot|e2el)[=:](\d+(?:\.\d+)?)(ms|s)?", part)
            if match is None:
                raise InvalidParameter(f"{part!r} is no objective such as ttft=200, tpot=50ms or e2el=10s")
            limits[match[1]] = float(match[2]) * (1000 if match[3] == "s" else 1)
        if not limits:
            raise InvalidParameter("an SLO names at least one of ttft, tpot and e2el")
        return cls(limits)

    def __str__(self) -> str:
        return ", ".join(f"{METRICS[name]} <= {limit:g} ms" for name, limit in self.limits.items())

    def holds(self, latency: dict[str, float | None]) -> bool:
        """latency: milliseconds by metric; what a request of one token has none of (TPOT) is within any limit."""
        return all((latency[name] or 0.0) <= limit for name, limit in self.limits.items())


def latencies(record: Record) -> dict[str, float | None]:
    """Milliseconds of one answered request. tpot: None below two tokens."""
    ttft, e2el = record.token_times[0] - record.intended, record.end - record.intended
    later = num_output(record) - 1
    tpot = 1000 * (e2el - ttft) / later if later > 0 else None
    return {"ttft": 1000 * ttft, "tpot": tpot, "e2el": 1000 * e2el, "lag": 1000 * (record.sent - record.intended)}


def num_output(record: Record) -> int:
    """The server's count of tokens, or the number of chunks where it gives none."""
    return len(record.token_times) if record.num_output_tokens is None else record.num_output_tokens


def num_input(record: Record) -> int:
    return record.prompt_len if record.num_prompt_tokens is None else record.num_prompt_tokens


def summarise(run: Run, *, slo: Slo | None = None, percentiles: Sequence[float] = (50, 90, 99)) -> dict[str, Any]:
    """Everything of a run but its settings; failed requests count as misses of the SLO and in nothing else."""
    done = [record for record in run.records if record.error is None]
    rows = [latencies(record) for record in done]
    gaps = 1000 * np.concatenate([np.diff(record.token_times) for record in done]) if done else np.zeros(0)
    values = {name: np.array([row[name] for row in rows if row[name] is not None], float) for name in ("ttft", "tpot", "e2el", "lag")}
    values["itl"] = gaps
    duration, num_chunks = run.duration, sum(len(record.token_times) for record in done)
    total_input, total_output = sum(map(num_input, done)), sum(map(num_output, done))
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(run.records) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "requested_input_tokens": sum(record.prompt_len for record in done),
        "requested_output_tokens": sum(num_output(r) if r.output_len is None else r.output_len for r in done),
        "without_usage": sum(record.num_output_tokens is None for record in done),
        "tokens_per_chunk": total_output / num_chunks if num_chunks else 0.0,
        "request_throughput": len(done) / duration,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "max_concurrent_requests": peak_concurrency(done),
    }
    if slo is not None:
        good = sum(map(slo.holds, rows))
        result |= {"slo": slo.limits, "good": good, "request_goodput": good / duration, "slo_attainment": good / max(1, len(run.records))}
    for name in METRICS:
        result |= _statistics(name, values[name], percentiles)
    return result | {
        "client_cpu_s": run.client_cpu,
        "client_cpu_us_per_chunk": 1e6 * run.client_cpu / num_chunks if num_chunks else 0.0,
        "client_cpu_share": run.client_cpu / duration,
        "errors_by_kind": count_errors(run.records),
        "curves": {name: _curve(values[name]) for name in METRICS if len(values[name])},
        "timeline": timeline(run),
        "scatter": {"input_tokens": [num_input(r) for r in done], "ttft_ms": [round(row["ttft"] or 0.0, 2) for row in rows]},
    }


def _statistics(name: str, values: np.ndarray, percentiles: Sequence[float]) -> dict[str, float | None]:
    """mean_ttft_ms, median_ttft_ms, std_ttft_ms, max_ttft_ms, p50_ttft_ms, ... None where nothing was measured."""
    functions = {"mean": np.mean, "median": np.median, "std": np.std, "max": np.max}
    found: dict[str, float | None] = {f"{word}_{name}_ms": float(f(values)) if len(values) else None for word, f in functions.items()}
    for p in percentiles:
        found[f"p{p:g}_{name}_ms"] = float(np.percentile(values, p)) if len(values) else None
    return found


def _curve(values: np.ndarray) -> list[float]:
    """Milliseconds at NUM_QUANTILES quantiles, evenly from 0 to 1."""
    return [round(float(v), 3) for v in np.quantile(values, np.linspace(0, 1, NUM_QUANTILES))]


def peak_concurrency(records: Sequence[Record]) -> int:
    """The most requests that were under way at once."""
    events = sorted([(r.sent, 1) for r in records] + [(r.end, -1) for r in records])
    running = peak = 0
    for _, change in events:
        running += change
        peak = max(peak, running)
    return peak


def timeline(run: Run) -> dict[str, Any]:
    """Per bucket of `seconds`: chunks with tokens a second, requests in flight on average, failures."""
    seconds = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 600, 3600) if run.duration / s <= MAX_POINTS or s == 3600)
    edges = np.arange(int(run.duration / seconds) + 2) * seconds
    times = np.concatenate([r.token_times for r in run.records]) if run.records else np.zeros(0)
    in_flight = np.zeros(len(edges) - 1)
    for record in run.records:
        in_flight += np.clip(np.minimum(edges[1:], record.end) - np.maximum(edges[:-1], record.sent), 0, None)
    failures, _ = np.histogram([r.end for r in run.records if r.error is not None], edges)
    return {
        "seconds": seconds,
        "chunks_per_s": [round(float(n) / seconds, 1) for n in np.histogram(times, edges)[0]],
        "in_flight": [round(float(n) / seconds, 2) for n in in_flight],
        "failures": [int(n) for n in failures],
    }


def count_errors(records: Sequence[Record]) -> dict[str, int]:
    """How often each failure occurred, the commonest first; numbers in the messages are no difference."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for record in records:
        if record.error is not None:
            kind = first.setdefault(re.sub(r"\d+", "#", record.error), record.error)
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def details(run: Run) -> dict[str, list[Any]]:
    """One value a request, under the names of vLLM's --save-detailed. Seconds."""
    records = run.records
    return {
        "start_times": [r.sent for r in records],
        "intended_times": [r.intended for r in records],
        "input_lens": [num_input(r) for r in records],
        "output_lens": [num_output(r) for r in records],
        "ttfts": [r.token_times[0] - r.intended if r.token_times else None for r in records],
        "itls": [[round(float(gap), 6) for gap in np.diff(r.token_times)] for r in records],
        "e2els": [r.end - r.intended for r in records],
        "errors": [r.error or "" for r in records],
    }
