"""The plan: sizes add up, the KV cache is sensible, and what does not fit is refused with what would."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from apportion.core.config import CacheConfig, EngineConfig, LaneConfig, ModelConfig, ParallelConfig, SchedulerConfig
from apportion.core.errors import InvalidParameter, OutOfMemory
from apportion.core.model_spec import ModelSpec, RopeSpec
from apportion.engine.memory_plan import largest_model_len, plan_memory, sequence_kv_bytes

GIB = 2**30
SMALL = ModelSpec(
    architecture="LlamaForCausalLM", num_layers=6, hidden=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn=768, vocab=4096,
    max_position=2048, dtype="bfloat16", rope=RopeSpec(rotary_dim=64), norm_eps=1e-5, tied=True, windows=(None,) * 6,
)  # fmt: skip
LARGE = replace(
    SMALL, num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn=14336, vocab=128256, max_position=131072,
    tied=False, windows=(None,) * 32,
)  # fmt: skip


def plan(spec, free, *, cache=None, scheduler=None, **model):
    config = ModelConfig(model="m", **model)
    engine = EngineConfig(models=(config,), cache=cache or CacheConfig(), scheduler=scheduler or SchedulerConfig())
    return plan_memory([(config, spec)], engine, free)


def test_rows_add_up():
    memory = plan(SMALL, 16 * GIB)
    rows = dict(memory.rows())
    assert rows["total"] == sum(v for k, v in rows.items() if k not in ("total", "free")) == memory.total <= memory.free
    assert 11_400_000 < rows["weights"] < 11_700_000


def test_a_small_model_takes_no_more_than_it_can_use():
    memory = plan(SMALL, 10_000 * GIB)
    assert memory.kv_cache == 256 * memory.models[0].sequence_kv < 3 * GIB
    assert plan(SMALL, 10_000 * GIB, scheduler=SchedulerConfig(max_num_seqs=1)).kv_cache == memory.models[0].sequence_kv


def test_a_large_model_takes_half_of_what_is_left_or_one_sequence():
    memory = plan(LARGE, 100 * GIB, max_model_len=131072)
    left = 100 * GIB - memory.weights - memory.activations - memory.rotary - memory.fixed
    assert memory.kv_cache == left // 2
    tight = plan(LARGE, 100 * GIB - left + int(memory.models[0].sequence_kv / 0.85), max_model_len=131072)
    assert tight.kv_cache == tight.models[0].sequence_kv


def test_every_worker_has_buffers_and_rotary_tables_of_its_own():
    def planned(*lanes, size=1):
        config = ModelConfig(model="m")
        parallel = ParallelConfig(tensor_parallel_size=size)
        return plan_memory([(config, SMALL)], EngineConfig(models=(config,), lanes=lanes, parallel=parallel), 16 * GIB)

    one = planned(LaneConfig())
    assert one.rotary == 2048 * 64 * 4
    two = planned(LaneConfig(name="a"), LaneConfig(name="b"))
    assert (two.weights, two.activations, two.rotary, two.fixed) == (one.weights, 2 * one.activations, 2 * one.rotary, one.fixed)
    ranks = planned(LaneConfig(executor="multiproc"), size=2)
    assert (ranks.rotary, ranks.fixed) == (2 * one.rotary, 2 * one.fixed)
    assert planned(LaneConfig(), LaneConfig(name="other", models=("other",))).rotary == one.rotary


def test_weights_that_do_not_fit():
    with pytest.raises(OutOfMemory, match=r"weights of 14\.\d+ GiB .* do not fit: 8\.00 GiB are free"):
        plan(LARGE, 8 * GIB)


@pytest.mark.parametrize("explicit", [True, False])
def test_a_length_that_does_not_fit_says_which_would(explicit):
    cache = CacheConfig(kv_cache_memory=2 * GIB) if explicit else CacheConfig()
    free = 24 * GIB if explicit else 20 * GIB
    with pytest.raises(OutOfMemory, match="max_model_len 131072 of m needs") as caught:
        plan(LARGE, free, cache=cache, max_model_len=131072)
    would = int(re.search(r"largest that fits is (\d+)", str(caught.value)).group(1))
    assert 1000 < would < 131072
    assert plan(LARGE, free, cache=cache, max_model_len=would).models[0].max_model_len == would
    assert plan(LARGE, free, cache=cache).models[0].max_model_len == would  # nobody named a length: it is lowered
    with pytest.raises(OutOfMemory):
        plan(LARGE, free, cache=cache, max_model_len=would + 64)


def test_an_explicit_size_is_taken_or_refused():
    assert plan(SMALL, 16 * GIB, cache=CacheConfig(kv_cache_memory=100_000_000)).kv_cache == 100_000_000
    with pytest.raises(OutOfMemory, match=r"kv_cache_memory of 20\.00 GiB does not fit"):
        plan(SMALL, 16 * GIB, cache=CacheConfig(kv_cache_memory=20 * GIB))


def test_a_window_bounds_the_sequence():
    windowed = replace(LARGE, windows=(4096,) * 32)
    assert plan(windowed, 100 * GIB).models[0].sequence_kv < plan(LARGE, 100 * GIB).models[0].sequence_kv / 15
    groups = windowed.kv_groups("auto", 32)
    slab = 16 * groups[0].block_bytes
    assert sequence_kv_bytes(groups, 10**6, 2048, slab) == sequence_kv_bytes(groups, 4096 + 2048, 2048, slab)


def test_largest_model_len_is_the_last_that_fits():
    groups = LARGE.kv_groups("auto", 32)
    slab = 16 * groups[0].block_bytes
    length = largest_model_len(groups, 10 * slab, 2048, slab)
    assert sequence_kv_bytes(groups, length, 2048, slab) == 10 * slab < sequence_kv_bytes(groups, length + 1, 2048, slab)
    assert largest_model_len(groups, slab - 1, 2048, slab) == 0


def test_more_positions_than_the_model_has():
    with pytest.raises(InvalidParameter, match="max_model_len 4096 is more than the 2048 positions that m is made for"):
        plan(SMALL, 16 * GIB, max_model_len=4096)
