"""Latency, throughput and bandwidth measure what they say, on the smallest work that shows it."""

import argparse

import pytest

from apportion.assets import DEFAULT_MODEL
from apportion.bench.bandwidth import Bandwidth, measure_bandwidth
from apportion.bench.latency import measure_latency, random_prompts, time_batch
from apportion.bench.throughput import measure_throughput
from apportion.core.errors import InvalidParameter
from apportion.kernels.cpu import extension
from apportion.llm import LLM


@pytest.fixture(scope="module")
def llm():
    with LLM(DEFAULT_MODEL, max_model_len=128, kv_cache_memory=8 << 20) as llm:
        yield llm


@pytest.fixture(scope="module")
def vocab(llm):
    return next(iter(llm.engine.models.values())).spec.vocab


def test_time_batch_counts_every_token(llm, vocab):
    timing = time_batch(llm, random_prompts(3, 8, vocab, seed=1), 5)
    assert [len(row) for row in timing.token_ids] == [5, 5, 5]
    assert timing.prefill_s > 0 and timing.decode_s > 0


def test_latency_of_a_prefill_has_no_step(llm, vocab):
    result = measure_latency(llm, vocab=vocab, batch_size=2, input_len=8, output_len=1, num_iters_warmup=0, num_iters=2)
    assert result["step_ms"] is None and result["decode_tokens_per_s"] is None
    assert result["prefill_tokens_per_s"] == pytest.approx(16 / result["prefill_s"])
    assert len(result["latencies_s"]) == 2


def test_throughput_counts_tokens_and_draws_lengths(llm, vocab):
    result = measure_throughput(llm, vocab=vocab, num_prompts=4, input_len=10, output_len=6, range_ratio=0.5, seed=2)
    assert 4 * 5 <= result["total_input_tokens"] <= 4 * 15 and 4 * 3 <= result["total_output_tokens"] <= 4 * 9
    assert result["output_tokens_per_s"] == pytest.approx(result["total_output_tokens"] / result["elapsed_s"])
    with pytest.raises(InvalidParameter, match="range_ratio"):
        measure_throughput(llm, vocab=vocab, num_prompts=1, input_len=1, output_len=1, range_ratio=1.0)


def test_prompts_are_repeatable_and_differ_by_seed():
    assert random_prompts(2, 6, 100, 5) == random_prompts(2, 6, 100, 5) != random_prompts(2, 6, 100, 6)
    assert all(3 <= token < 100 for prompt in random_prompts(4, 50, 100, 7) for token in prompt)


@pytest.mark.skipif(not extension.available(), reason="the CPU kernels are not built")
def test_bandwidth_is_plausible():
    measured = measure_bandwidth(1, buffer_bytes=16 << 20, passes=2)
    assert 1e8 < measured.ordinary_pages < 1e12 and 1e8 < measured.huge_pages < 1e12


def test_floor_is_bytes_over_the_better_pages():
    assert Bandwidth(2, 1, 10e9, 20e9).floor_s(40e9) == pytest.approx(2.0)


@pytest.mark.skipif(not extension.available(), reason="the CPU kernels are not built")
def test_reading_memory_reads_every_byte():
    """The probe's xor is that of the buffer, whatever the number of threads: nothing is skipped."""
    import torch

    module = extension.load()
    words = torch.randint(0, 2**62, (3 * (1 << 18) // 8 + 8 * 5,), dtype=torch.int64)
    expected = 0
    for word in words.tolist():
        expected ^= word
    for threads in (1, 2):
        assert module.read_memory(module.ThreadTeam(threads), words.data_ptr(), words.numel() * 8) == expected


def test_flags_of_every_command_parse():
    from apportion.cli import bench

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(["latency", "--model", "m", "--batch-size", "2", "--input-len", "4", "--output-len", "5", "--json"])
    assert (args.command, args.model, args.batch_size, args.json) == ("latency", "m", 2, True)
    assert parser.parse_args(["make-model", "--preset", "bench-moe", "-o", "x"]).preset == "bench-moe"
    assert parser.parse_args(["throughput", "--num-prompts", "3"]).num_prompts == 3
