"""Slices of real traffic, replayed against a real server by the verb that measures it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from apportion.bench.traces import read_trace
from apportion.bench.workload import PromptMaker, trace_samples
from apportion.cli.main import main
from tests.unit.serving.conftest import metric

VOCAB, LONGEST, SEED = 4000, 2000, 5


@pytest.mark.parametrize(
    ("file", "num", "speedup", "scale"),
    [
        ("trace-azure-llm-2023/AzureLLMInferenceTrace_conv.csv", 40, 10, 0.1),
        ("trace-mooncake/conversation_trace.jsonl", 120, 10, 0.02),
    ],
    ids=["azure", "mooncake"],
)
def test_a_slice_is_answered_as_the_trace_has_it(server, shared_data, capsys, file, num, speedup, scale):
    path = shared_data(file)
    found = trace_samples(PromptMaker(VOCAB, SEED), read_trace(path, num), length_scale=scale, max_len=LONGEST)
    hits = metric(server, "prefix_cache_hits_total")
    flags = [
        "--dataset-name",
        "trace",
        "--dataset-path",
        str(path),
        "--num-prompts",
        str(num),
        "--speedup",
        str(speedup),
        "--seed",
        str(SEED),
    ]
    flags += ["--length-scale", str(scale), "--max-model-len", str(LONGEST), "--vocab-size", str(VOCAB), "--num-warmups", "0"]
    assert main(["bench", "serve", "--base-url", server.url, "--json", "-q", "--slo", "ttft=60s", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["completed"], result["failed"], result["num_too_long"]) == (len(found.samples), 0, found.num_too_long)
    assert result["total_input_tokens"] == sum(sample.prompt_len for sample in found.samples)
    assert result["total_output_tokens"] == sum(sample.output_len for sample in found.samples)
    assert result["duration"] >= found.times[-1] / speedup
    common = max(_common(a.prompt, b.prompt) for a, b in pairwise(sorted(found.samples, key=lambda sample: sample.prompt)))
    if common >= 64:  # two blocks: what is equal in the trace is found
        server.wait(lambda: metric(server, "prefix_cache_hits_total") > hits, "prefixes are found")
    else:
        assert metric(server, "prefix_cache_hits_total") == hits


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
