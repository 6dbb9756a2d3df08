"""Prometheus metrics, with vLLM's names, labels and buckets behind a prefix, so that dashboards made for it can be used."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from apportion.serving.messages import Finished, Status
from apportion.serving.stream import RequestRecord

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SMALL_COUNTS = (1, 2, 5, 10, 20)
TOKENS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))

HISTOGRAMS = {
    "time_to_first_token_seconds": ("Time from a request's arrival to its first token.", TTFT),
    "inter_token_latency_seconds": ("Time from one token of a sequence to the next.", ITL),
    "request_time_per_output_token_seconds": ("Mean time a token after the first, by request.", ITL),
    "e2e_request_latency_seconds": ("Time from a request's arrival to its last token.", LATENCY),
    "request_queue_time_seconds": ("Time a request waited before its first step.", LATENCY),
    "request_inference_time_seconds": ("Time from a request's first step to its last token.", LATENCY),
    "request_prefill_time_seconds": ("Time from a request's first step to its first token.", LATENCY),
    "request_decode_time_seconds": ("Time from a request's first token to its last.", LATENCY),
    "request_prompt_tokens": ("Prompt tokens, by request.", TOKENS),
    "request_generation_tokens": ("Generated tokens, by request.", TOKENS),
    "request_max_num_generation_tokens": ("Generated tokens of a request's longest sequence.", TOKENS),
    "request_params_n": ("The n of a request.", SMALL_COUNTS),
    "request_params_max_tokens": ("The max_tokens of a request.", TOKENS),
    "iteration_tokens_total": ("Tokens of one step.", STEP_TOKENS),
}
GAUGES = {
    "num_requests_running": "Sequences that steps compute now.",
    "num_requests_waiting": "Sequences that wait for a place in a step.",
    "kv_cache_usage_perc": "Share of the KV memory in use; 1 is all.",
    "kv_cache_held_bytes": "KV memory that this model's blocks hold, cached ones included.",
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests taken in.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found there.",
    "num_preemptions": "Sequences that gave their memory back and were computed again.",
    "softmax_rows_recomputed": "Rows of attention whose scores left the range of a unified maximum and were computed again.",
}
ENGINE_COUNTERS = ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "softmax_rows_recomputed")
LABELS = ("model_name", "engine")
CACHE_LABELS = (*LABELS, "block_size", "cache_dtype", "enable_prefix_caching", "num_gpu_blocks", "kv_cache_memory_bytes")
OLDER_NAMES = {"time_per_output_token_seconds": "inter_token_latency_seconds", "gpu_cache_usage_perc": "kv_cache_usage_perc"}
ENGINE = "0"  # there is one; vLLM numbers its data-parallel ones


class _OlderNames(Collector):
    """What vLLM called a metric before, for dashboards that ask for it: the same samples once more, at no cost while serving."""

    def __init__(self, metrics: Mapping[str, MetricWrapperBase]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for older, metric in self._metrics.items():
            for family in metric.collect():
                renamed = Metric(older, f"The older name of {family.name}.", family.type)
                renamed.samples = [s._replace(name=older + s.name.removeprefix(family.name)) for s in family.samples]
                yield renamed


class Metrics:
    """Observes the engine. prefix: before the colon of every name."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, prefix: str = "apportion") -> None:
        self._registry = registry = CollectorRegistry()

        def name(metric: str) -> str:
            return f"{prefix}:{metric}"

        self._histograms = {n: Histogram(name(n), text, LABELS, registry=registry, buckets=b) for n, (text, b) in HISTOGRAMS.items()}
        self._gauges = {n: Gauge(name(n), text, LABELS, registry=registry) for n, text in GAUGES.items()}
        self._counters = {n: Counter(name(n), text, LABELS, registry=registry) for n, text in COUNTERS.items()}
        self._ends = Counter(name("request_success"), "Sequences that ended, by reason.", (*LABELS, "finished_reason"), registry=registry)
        registry.register(_OlderNames({name(older): (self._histograms | self._gauges)[now] for older, now in OLDER_NAMES.items()}))
        self._caches = Gauge(name("cache_config_info"), "How the KV memory is cut; always 1.", CACHE_LABELS, registry=registry)
        self._deaths = Counter(name("engine_deaths"), "Deaths of the engine process.", registry=registry)
        self._rss = Gauge(name("engine_resident_memory_bytes"), "Resident memory of the engine process.", registry=registry)
        self._kv_total = Gauge(name("kv_cache_total_bytes"), "KV memory of all models together.", registry=registry)
        self.http_requests = Counter(name("http_requests"), "HTTP requests answered.", ("method", "path", "status"), registry=registry)
        self.lost_log_lines = Counter(name("lost_log_lines"), "Log lines that could not be written.", registry=registry)
        self._bound: dict[tuple[str, str], Any] = {}
        self._engine_counts: dict[tuple[str, str], int] = {}  # as of the last Status

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def totals(self, names: Iterable[str]) -> dict[tuple[str, str], float]:
        """(name with its _total, _sum or _count, model) -> value, of counters and histograms without their prefix."""
        found = {}
        for name in names:
            family = self._counters.get(name) or self._histograms[name]
            for sample in next(iter(family.collect())).samples:
                suffix = sample.name.rpartition("_")[2]
                if suffix in ("total", "sum", "count"):
                    found[f"{name}_{suffix}", sample.labels["model_name"]] = sample.value
        return found

    def on_tokens(self, model: str, num_tokens: int, ttft_s: float | None, itl_s: float | None) -> None:
        """Tokens of one sequence came; those that came together waited together. Times: None where the answer is not streamed."""
        self._of(self._counters, "generation_tokens", model).inc(num_tokens)
        if ttft_s is not None:
            self._of(self._histograms, "time_to_first_token_seconds", model).observe(ttft_s)
        if itl_s is not None:
            self._of(self._histograms, "inter_token_latency_seconds", model).observe(itl_s)

    def on_end(self, record: RequestRecord, finished: Finished | None) -> None:
        """A request has ended; finished is None when it was aborted, refused or lost with the engine."""
        request, model = record.request, record.request.model
        for reason, number in Counts(reason or "abort" for reason in record.finish_reasons).items():
            self._ends.labels(model, ENGINE, reason).inc(number)
        if finished is None:
            return
        tokens = record.num_tokens
        e2e = max(record.last_s) - request.arrival_s
        gap_s = finished.decode_s / (tokens[0] - 1) if finished.decode_s and tokens[0] > 1 else None
        observed = {
            "e2e_request_latency_seconds": e2e,
            "request_queue_time_seconds": finished.queue_s,
            "request_prefill_time_seconds": finished.prefill_s,
            "request_decode_time_seconds": finished.decode_s,
            "request_inference_time_seconds": None if finished.queue_s is None else max(0.0, e2e - finished.queue_s),
            "request_time_per_output_token_seconds": gap_s,
            "request_prompt_tokens": len(request.prompt_token_ids),
            "request_generation_tokens": sum(tokens),
            "request_max_num_generation_tokens": max(tokens),
            "request_params_n": request.params.n,
            "request_params_max_tokens": request.params.max_tokens,
        }
        for metric, value in observed.items():
            if value is not None:
                self._of(self._histograms, metric, model).observe(value)
        self._of(self._counters, "prompt_tokens", model).inc(len(request.prompt_token_ids))
        if request.stream or finished.queue_s is None or finished.prefill_s is None:
            return
        self._of(self._histograms, "time_to_first_token_seconds", model).observe(finished.queue_s + finished.prefill_s)
        if gap_s is not None:
            gaps = self._of(self._histograms, "inter_token_latency_seconds", model)
            for _ in range(sum(tokens) - len(tokens)):
                gaps.observe(gap_s)

    def on_status(self, status: Status) -> None:
        for model, tokens in status.steps:
            self._of(self._histograms, "iteration_tokens_total", model).observe(tokens)
        for model, now in status.metrics.items():
            self._of(self._gauges, "num_requests_running", model).set(now.num_requests_running)
            self._of(self._gauges, "num_requests_waiting", model).set(now.num_requests_waiting)
            self._of(self._gauges, "kv_cache_usage_perc", model).set(now.kv_cache_usage_perc)
            self._of(self._gauges, "kv_cache_held_bytes", model).set(status.kv_bytes.get(model, 0))
            for metric in ENGINE_COUNTERS:
                count = getattr(now, metric)
                self._of(self._counters, metric, model).inc(max(0, count - self._engine_counts.get((metric, model), 0)))
                self._engine_counts[metric, model] = count
        for model in {m for _, m in self._engine_counts} - status.metrics.keys():  # unloaded: it counts from zero when it comes back
            for metric in ENGINE_COUNTERS:
                self._engine_counts[metric, model] = 0
            for gauge in GAUGES:
                self._of(self._gauges, gauge, model).set(0)
        self._caches.clear()
        for model, cache in status.caches.items():
            shape = (cache.block_size, cache.cache_dtype, cache.enable_prefix_caching, cache.num_blocks, status.kv_total_bytes)
            self._caches.labels(model, ENGINE, *shape).set(1)
        self._rss.set(status.rss_bytes)
        self._kv_total.set(status.kv_total_bytes)

    def on_death(self) -> None:
        self._deaths.inc()
        self._engine_counts.clear()
        for gauge in self._gauges.values():
            gauge.clear()
        self._bound = {key: child for key, child in self._bound.items() if key[0] not in GAUGES}

    def _of(self, family: Mapping[str, Any], metric: str, model: str) -> Any:
        """The child of a metric for a model; looked up once."""
        child = self._bound.get((metric, model))
        if child is None:
            child = self._bound[metric, model] = family[metric].labels(model, ENGINE)
        return child
