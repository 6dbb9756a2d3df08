"""Metrics as Prometheus reads them: vLLM's names, bounds and meaning, also of what it has renamed."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from apportion.core.metrics import EngineMetrics
from apportion.core.sampling_params import SamplingParams
from apportion.serving.messages import CacheStatus, Finished, Generate, Status
from apportion.serving.metrics import Metrics
from apportion.serving.stream import RequestRecord

# As vLLM's documentation and dashboards have them; seconds, and tokens of a step.
LATENCY = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
ITL = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
BOUNDS = {
    "time_to_first_token_seconds": [
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
        *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
    ],
    "inter_token_latency_seconds": ITL,
    "time_per_output_token_seconds": ITL,
    "request_time_per_output_token_seconds": ITL,
    **{f"request_{part}_time_seconds": LATENCY for part in ("queue", "prefill", "decode", "inference")},
    "e2e_request_latency_seconds": LATENCY,
    "iteration_tokens_total": [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    "request_params_n": [1, 2, 5, 10, 20],
}


@pytest.fixture
def metrics() -> Metrics:
    """After one request of three tokens: the first after 0.3 s, the others 0.04 s apart."""
    metrics = Metrics("vllm")
    request = Generate("r", "m", [1, 2, 3, 4], SamplingParams(max_tokens=3), stream=True, arrival_s=100.0)
    record = RequestRecord(request)
    for ttft, itl in ((0.3, None), (None, 0.04), (None, 0.04)):
        metrics.on_tokens("m", 1, ttft, itl)
    record.num_tokens, record.last_s, record.finish_reasons = [3], [100.38], ["length"]
    metrics.on_end(record, Finished("r", queue_s=0.1, prefill_s=0.2, decode_s=0.08))
    now = EngineMetrics(num_requests_running=2, num_requests_waiting=1, kv_cache_usage_perc=0.25)
    now.prefix_cache_queries, now.prefix_cache_hits = 8, 4
    cache = CacheStatus(block_size=32, cache_dtype="auto", enable_prefix_caching=True, num_blocks=640)
    metrics.on_status(Status(True, 0.0, {"m": now}, caches={"m": cache}, kv_total_bytes=100, steps=[("m", 4)]))
    return metrics


def families(metrics: Metrics) -> dict:
    return {f.name.removeprefix("vllm:"): f for f in text_string_to_metric_families(metrics.exposition().decode())}


def value(metrics: Metrics, name: str) -> float:
    [sample] = [s for f in families(metrics).values() for s in f.samples if s.name == f"vllm:{name}" and "le" not in s.labels]
    return sample.value


def test_bounds_are_those_that_dashboards_were_made_for(metrics):
    found = families(metrics)
    for name, expected in BOUNDS.items():
        bounds = [float(s.labels["le"]) for s in found[name].samples if s.name.endswith("_bucket")]
        assert bounds == [*expected, float("inf")], name
    for name in ("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens", "request_params_max_tokens"):
        bounds = [float(s.labels["le"]) for s in found[name].samples if s.name.endswith("_bucket")]
        assert bounds[:8] == [1, 2, 5, 10, 20, 50, 100, 200]


def test_a_request_is_counted_where_it_belongs(metrics):
    expected = {
        "time_to_first_token_seconds_sum": 0.3, "inter_token_latency_seconds_count": 2, "request_time_per_output_token_seconds_sum": 0.04,
        "e2e_request_latency_seconds_sum": 0.38, "request_queue_time_seconds_sum": 0.1, "request_prefill_time_seconds_sum": 0.2,
        "request_decode_time_seconds_sum": 0.08, "request_inference_time_seconds_sum": 0.28, "request_prompt_tokens_sum": 4,
        "request_generation_tokens_sum": 3, "generation_tokens_total": 3, "prompt_tokens_total": 4, "iteration_tokens_total_sum": 4,
        "num_requests_running": 2, "num_requests_waiting": 1, "kv_cache_usage_perc": 0.25, "prefix_cache_hits_total": 4,
    }  # fmt: skip
    assert {name: pytest.approx(value(metrics, name)) for name in expected} == expected
    [ended] = families(metrics)["request_success"].samples
    assert (ended.labels["finished_reason"], ended.value) == ("length", 1)


def test_an_answer_that_is_not_streamed_has_a_first_token_too(metrics):
    """As the engine tells it: not when the whole answer arrived."""
    before = {name: value(metrics, name) for name in ("time_to_first_token_seconds_sum", "inter_token_latency_seconds_sum")}
    record = RequestRecord(Generate("r", "m", [1, 2], SamplingParams(max_tokens=5, temperature=1.0, n=2), stream=False, arrival_s=200.0))
    record.num_tokens, record.last_s, record.finish_reasons = [5, 3], [202.0, 202.0], ["length", "stop"]
    metrics.on_end(record, Finished("r", queue_s=0.5, prefill_s=0.3, decode_s=1.2))
    after = {name: value(metrics, name) - was for name, was in before.items()}
    assert after == {"time_to_first_token_seconds_sum": pytest.approx(0.8), "inter_token_latency_seconds_sum": pytest.approx(6 * 0.3)}
    assert value(metrics, "inter_token_latency_seconds_count") == 2 + 6 and value(metrics, "time_to_first_token_seconds_count") == 2


def test_older_names_say_the_same(metrics):
    found = families(metrics)
    assert value(metrics, "gpu_cache_usage_perc") == 0.25
    older, newer = found["time_per_output_token_seconds"], found["inter_token_latency_seconds"]
    assert older.type == newer.type == "histogram"
    plain = [(s.name.replace("inter_token_latency", "time_per_output_token"), s.labels, s.value) for s in newer.samples]
    assert [(s.name, s.labels, s.value) for s in older.samples] == plain and len(plain) == len(ITL) + 3


def test_how_the_cache_is_cut_stands_in_labels(metrics):
    [info] = families(metrics)["cache_config_info"].samples
    assert info.value == 1 and info.labels == {
        "model_name": "m", "engine": "0", "block_size": "32", "cache_dtype": "auto", "enable_prefix_caching": "True",
        "num_gpu_blocks": "640", "kv_cache_memory_bytes": "100",
    }  # fmt: skip


def test_counters_of_the_engine_never_go_back(metrics):
    """A model that is unloaded and comes back, and an engine that dies, begin again from zero; what was counted stays."""
    metrics.on_status(Status(busy=False, since_step_s=0.0))
    assert value(metrics, "num_requests_running") == 0 and "cache_config_info" in families(metrics)
    again = Status(busy=False, since_step_s=0.0, metrics={"m": EngineMetrics(prefix_cache_hits=3, prefix_cache_queries=5)})
    metrics.on_status(again)
    assert value(metrics, "prefix_cache_hits_total") == 7
    metrics.on_death()
    metrics.on_status(again)
    assert value(metrics, "prefix_cache_hits_total") == 10 and value(metrics, "engine_deaths_total") == 1
