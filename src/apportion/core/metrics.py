"""Metric names, spelt as vLLM spells them after the prefix, and the plain counters the engine keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineMetrics:
    """Counters since start and gauges of now, for one model."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    softmax_rows_recomputed: int = 0  # under a unified maximum: rows of attention whose scores left its range
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage_perc: float = 0.0
