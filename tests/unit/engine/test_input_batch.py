"""Deltas to tensors, against a description that keeps plain lists."""

import random

import numpy as np
import pytest

from apportion.core.errors import InternalError
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import CachedRequest, NewRequest, SchedulerOutput
from apportion.engine.input_batch import InputBatch

GREEDY = SamplingParams(temperature=0.0)


def new(request_id, tokens, prompt=None, computed=0, blocks=((0,),), params=GREEDY):
    return NewRequest(request_id, list(tokens), prompt or len(tokens), computed, params, tuple(list(b) for b in blocks))


def step(counts, **news):
    return SchedulerOutput(0, "m", counts, **news)


def test_chunks_decodes_and_samples_of_one_step():
    batch = InputBatch(2, 100)
    counts = {"b": 3, "a": 1, "c": 2}
    batch.update(
        step(
            counts,
            new_requests=[
                new("a", range(10, 15), prompt=4, computed=4, blocks=([7], [8])),
                new("b", range(20, 28), computed=2, blocks=([1, 2], [-1, 3])),
                new("c", [30, 31], blocks=([5], [6])),
            ],
        )
    )
    inputs = batch.build(counts)
    assert inputs.request_ids == ["b", "a", "c"]
    assert inputs.token_ids_T.tolist() == [22, 23, 24, 14, 30, 31]
    assert inputs.positions_T.tolist() == [2, 3, 4, 4, 0, 1]
    assert inputs.query_start_loc.tolist() == [0, 3, 4, 6] and inputs.seq_lens.tolist() == [5, 5, 2]
    assert inputs.sampled.tolist() == [1, 2] and inputs.logit_rows.tolist() == [3, 5]
    assert inputs.block_tables[0].tolist()[0] == [1, 2] and inputs.block_tables[1].tolist()[0] == [-1, 3]
    assert [t.tolist()[1][0] for t in inputs.block_tables] == [7, 8]
    start, position, targets = batch.prompt_targets(inputs, 0)
    assert (start, position, targets.tolist()) == (0, 3, [23, 24, 25])
    assert batch.prompt_targets(inputs, 2)[2].tolist() == [31]


def test_the_next_step_reads_what_was_sampled_here():
    batch = InputBatch(1, 100)
    batch.update(step({"a": 2}, new_requests=[new("a", [1, 2])]))
    first = batch.build({"a": 2})
    batch.append(first, np.array([42], np.int32))
    second = batch.build({"a": 1})  # nothing was said about it: one more token, at the next position
    assert second.token_ids_T.tolist() == [42] and second.positions_T.tolist() == [2] and second.sampled.tolist() == [0]
    batch.update(step({"a": 2}, cached_requests=[CachedRequest("a", 2, new_token_ids=[42, 43])]))  # sampled elsewhere
    with pytest.raises(InternalError, match="'gone' was scheduled"):
        batch.build({"gone": 1})


def test_random_histories_equal_plain_lists():
    """Admissions, chunks, block growth, windows, departures and returns, hundreds of steps long."""
    rng = random.Random(0)
    batch, known, plain = InputBatch(2, 1000), {}, 0
    for _step in range(400):
        news, cached, gone, counts = [], [], [], {}
        for request_id in list(known):
            tokens, tables, computed = known[request_id]
            fate = rng.random()
            if fate < 0.04:
                gone.append(request_id)
                del known[request_id]
            elif fate < 0.8:
                count = rng.randint(1, len(tokens) - computed)
                growth = tuple([rng.randrange(10**6) for _ in range(rng.choice([0, 0, 0, 1, 5]))] for _ in range(2))
                for table, entries in zip(tables, growth, strict=True):
                    table += entries
                dead = rng.randint(0, len(tables[1]) - 1)
                tables[1][:dead] = [-1] * dead
                cached.append(CachedRequest(request_id, computed, [], growth, (0, dead)))
                counts[request_id] = count
        for _ in range(rng.choice([0, 0, 1, 3])):
            request_id = f"r{rng.randrange(60)}"
            if request_id not in known:
                tokens = [rng.randrange(1000) for _ in range(rng.choice([1, 7, 300, 900]))]
                tables = tuple([rng.randrange(10**6) for _ in range(rng.choice([1, 20]))] for _ in range(2))
                known[request_id] = (tokens, [list(t) for t in tables], 0)
                news.append(new(request_id, tokens, blocks=tables))
                counts[request_id] = rng.randint(1, len(tokens))
        batch.update(step(counts, new_requests=news, cached_requests=cached, finished_ids=gone))
        if not counts:
            continue
        inputs = batch.build(counts)
        expected, sampled = [], []
        for i, (request_id, count) in enumerate(counts.items()):
            tokens, tables, computed = known[request_id]
            expected += [(tokens[p], p) for p in range(computed, computed + count)]
            for group, table in enumerate(tables):
                assert inputs.block_tables[group][i, : len(table)].tolist() == table
            if computed + count == len(tokens):
                sampled.append(i)
        assert list(zip(inputs.token_ids_T.tolist(), inputs.positions_T.tolist(), strict=True)) == expected
        assert inputs.sampled.tolist() == sampled
        drawn = np.arange(plain, plain + len(sampled), dtype=np.int32)
        plain += len(sampled)
        batch.append(inputs, drawn)
        for i, (request_id, count) in enumerate(counts.items()):
            tokens, tables, computed = known[request_id]
            if i in sampled:
                tokens.append(int(drawn[sampled.index(i)]))
            known[request_id] = (tokens, tables, computed + count)


def test_a_request_that_cannot_run_is_reported_and_the_others_go_on():
    batch = InputBatch(1, 50)
    bad = SamplingParams(temperature=0.0, logit_bias={50: 1.0})
    errors = batch.update(step({}, new_requests=[new("good", [1]), new("bad", [1], params=bad)]))
    assert list(errors) == ["bad"] and "logit_bias has the token id 50" in errors["bad"]
    assert len(batch.build({"good": 1, "bad": 1}).rows) == 2


def test_random_sampling_needs_a_seed():
    with pytest.raises(InternalError, match="temperature 1 without a seed"):
        InputBatch(1, 50).update(step({}, new_requests=[new("a", [1], params=SamplingParams())]))
