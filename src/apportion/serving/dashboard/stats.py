"""What the live view shows, as plain data. Totals only ever grow: a reader takes differences and knows what happened between."""

from __future__ import annotations

import time
from typing import Any

from apportion.serving.messages import ModelInfo
from apportion.serving.server import Server

COUNTERS = ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions")
LATENCIES = {"time_to_first_token_seconds": "ttft", "inter_token_latency_seconds": "itl"}


def collect_stats(server: Server) -> dict[str, Any]:
    """One reading of everything. `time` is unix seconds; *_sum are seconds, and sum / count between two readings is a mean latency.

    kv_bytes: what a model's blocks hold, those included that are kept only because a prompt may begin alike. kv_usage: the share of the
    memory that running requests need.
    """
    totals = server.metrics.totals((*COUNTERS, *LATENCIES))
    status = server.engine.status
    return {
        "time": time.time(),
        "uptime_s": time.time() - server.started_s,
        "version": server.config.version,
        "not_ready": server.engine.why_not_ready(server.config.step_timeout),
        "engine_deaths": server.engine.num_deaths,
        "engine_rss_bytes": status.rss_bytes if status else 0,
        "kv_total_bytes": status.kv_total_bytes if status else 0,
        "models": [_model(server, info, totals) for info in server.models.values()],
        "lanes": [
            {
                "name": lane.name,
                "phases": lane.phases,
                "models": lane.models,
                "num_threads": lane.num_threads,
                "num_deaths": lane.num_deaths,
                "in_flight": lane.in_flight,
            }
            for lane in (status.lanes if status else [])
        ],
    }


def _model(server: Server, info: ModelInfo, totals: dict[tuple[str, str], float]) -> dict[str, Any]:
    status = server.engine.status
    now = status.metrics.get(info.name) if status else None
    latencies = {
        f"{short}_{word}": totals.get((f"{name}_{word}", info.name), 0.0) for name, short in LATENCIES.items() for word in ("sum", "count")
    }
    return {
        "name": info.name,
        "state": info.state.value,
        "error": info.error or None,
        "max_model_len": info.max_model_len,
        "weight_bytes": info.weight_bytes,
        "kv_bytes": status.kv_bytes.get(info.name, 0) if status else 0,
        "kv_usage": now.kv_cache_usage_perc if now else 0.0,
        "running": now.num_requests_running if now else 0,
        "waiting": now.num_requests_waiting if now else 0,
        **{name: totals.get((f"{name}_total", info.name), 0.0) for name in COUNTERS},
        **latencies,
    }
