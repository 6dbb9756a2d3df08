"""The engine over fake executors: whatever the interleaving, every request says what it would say alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.core.config import EngineConfig, LaneConfig, ModelConfig, SchedulerConfig
from apportion.core.errors import ExecutorDied, InvalidParameter, InvalidRequest, OutOfMemory, Unsupported

from .house import ONE_LANE, TWO_LANES, House, group, model_spec, prompts

LANES = {
    "one": ONE_LANE,
    "one, depth 2": (LaneConfig(depth=2),),
    "prefill | decode": TWO_LANES,
    "prefill | decode, depth 2": tuple(LaneConfig(name=lane.name, phases=lane.phases, depth=2) for lane in TWO_LANES),
    "two alike, depth 3": (LaneConfig(name="a", depth=3), LaneConfig(name="b", depth=2)),
}
GROUPS = {
    "full": (group(),),
    "full + window": (group(), group(window=9)),
    "window": (group(window=6),),
    "unequal blocks": (group(8), group(4, window=10, layers=2)),
}


@st.composite
def houses(draw, models=1, deaths=False):
    lanes = LANES[draw(st.sampled_from(sorted(LANES)))]
    rng = random.Random(draw(st.integers(0, 2**32)))
    die_at = {}
    if deaths:
        lives = st.lists(st.sets(st.integers(0, 12), max_size=1), max_size=2 // len(lanes))  # a third death of one request ends it
        die_at = {lane.name: draw(lives) for lane in lanes}
    house = House(
        {f"m{i or ''}": GROUPS[draw(st.sampled_from(sorted(GROUPS)))] for i in range(models)},
        num_slabs=draw(st.integers(10, 24)),
        lanes=lanes,
        rng=rng,
        die_at=die_at,
        max_position=80,
        max_num_batched_tokens=draw(st.sampled_from([3, 8, 64])),
        max_num_seqs=draw(st.sampled_from([1, 3, 16])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 5])),
    )
    for model in house.engine.models.values():
        model.scheduler._growth = draw(st.sampled_from([0.0, 0.1]))  # 0: admitted in haste, preempted often
    return house


def fill(house, count, seed, arrivals=True):
    """Adds requests, some of them only while others run. Returns them and what to call before each step."""
    rng = random.Random(seed)
    names = list(house.groups)
    requests, late = [], []
    for index, prompt in enumerate(prompts(count, seed, longest=36)):
        fields = {"model": rng.choice(names), "priority": rng.randrange(3), "tenant": rng.choice(["", "", "other"])}
        args = (f"r{index}", prompt, rng.randint(1, 20))
        if arrivals and rng.random() < 0.5:
            late.append((rng.randrange(20), args, fields))
        else:
            requests.append(house.add(*args, **fields))

    def before_step(index):
        for item in [item for item in late if item[0] <= index]:
            late.remove(item)
            requests.append(house.add(*item[1], **item[2]))

    return requests, before_step


def check(house, requests):
    for request in requests:
        assert request.finish_reason == "length", (request.request_id, request.error)
        assert request.output_token_ids == house.expected(request)
    for model in house.engine.models.values():
        assert model.scheduler.kv.num_live == 0


@settings(max_examples=120, deadline=None)
@given(houses(), st.integers(0, 2**32))
def test_tokens_are_those_of_a_run_alone(house, seed):
    requests, before_step = fill(house, 9, seed)
    house.run(before_step=before_step)
    check(house, requests)


@settings(max_examples=60, deadline=None)
@given(houses(models=3), st.integers(0, 2**32))
def test_models_share_the_arena(house, seed):
    requests, before_step = fill(house, 12, seed)
    house.run(before_step=before_step)
    check(house, requests)


@settings(max_examples=100, deadline=None)
@given(houses(models=2, deaths=True), st.integers(0, 2**32))
def test_a_lane_that_dies_costs_no_token(house, seed):
    requests, before_step = fill(house, 8, seed)
    house.run(before_step=before_step)
    check(house, requests)


@settings(max_examples=100, deadline=None)
@given(houses(models=2, deaths=True), st.integers(0, 2**32))
def test_aborts_disturb_nobody_else(house, seed):
    requests, add_late = fill(house, 10, seed)
    rng = random.Random(seed)
    aborted = set()

    def before_step(index):
        add_late(index)
        if rng.random() < 0.3:
            victim = rng.choice(requests) if requests else None
            if victim is not None and not victim.is_finished:
                aborted.add(victim)
                house.engine.abort(victim.request_id)

    updates = house.run(before_step=before_step)
    assert {u.request for u in updates if u.request.finish_reason == "abort"} == aborted
    check(house, [r for r in requests if r not in aborted])
    for request in aborted:
        assert request.output_token_ids == house.expected(request)[: request.num_output_tokens]


@settings(max_examples=120, deadline=None)
@given(houses(models=2, deaths=True), st.integers(0, 2**32))
def test_reclaiming_moves_blocks_under_running_requests(house, seed):
    requests, add_late = fill(house, 9, seed)
    rng = random.Random(seed)

    def before_step(index):
        add_late(index)
        model = rng.choice(sorted(house.groups))
        if rng.random() < 0.15:
            limit = rng.choice([None, 2, 6])
            house.engine.set_quota(model, limit and limit * house.arena.slab_bytes)
        if rng.random() < 0.3:
            house.engine.reclaim(model, rng.randint(1, 3) * house.arena.slab_bytes)
        house.engine.check_integrity()

    for model in house.engine.models.values():  # what is late may come when the quota is too small for it
        model.scheduler.kv.max_request_len = lambda: 10**6
    house.run(before_step=before_step)
    check(house, requests)


@settings(max_examples=40, deadline=None)
@given(houses(), st.integers(0, 2**32))
def test_updates_carry_every_token_once(house, seed):
    requests, before_step = fill(house, 6, seed)
    told = {}
    for update in house.run(before_step=before_step):
        told.setdefault(update.request, []).extend(update.token_ids)
    assert told == {request: request.output_token_ids for request in requests}


def test_no_request_starves():
    """A long request in short memory ends although shorter ones keep arriving after it."""
    house = House({"m": (group(),)}, num_slabs=12, max_position=120, max_num_batched_tokens=8, max_num_seqs=4)
    first = house.add("first", range(40), 40)
    for step in range(2000):
        if first.is_finished:
            break
        if step % 2 == 0:
            house.add(f"late{step}", [step % 1000] * 9, 20)
        house.engine.step(0.0)
    assert first.output_token_ids == house.expected(first)


def test_priority_runs_first():
    house = House({"m": (group(),)}, max_num_seqs=1, policy="priority")
    ordered = [house.add(name, [1, 2, 3], priority=priority) for name, priority in (("c", 5), ("a", -1), ("b", 0))]
    ends = [u.request.request_id for u in house.run() if u.request.is_finished and u.token_ids]
    assert list(dict.fromkeys(ends)) == ["a", "b", "c"] and all(r.is_finished for r in ordered)


def test_two_lanes_hand_requests_over():
    house = House({"m": (group(),)}, lanes=TWO_LANES, max_num_batched_tokens=16)
    request = house.add("r", range(20), 5)
    house.run()
    assert request.output_token_ids == house.expected(request)
    prefill, decode = (executor for _, executor in house.executors)
    assert [step.num_scheduled_tokens["r"] for step in prefill.steps] == [16, 4]
    assert [step.num_scheduled_tokens["r"] for step in decode.steps] == [1] * 4
    moved = decode.steps[0].new_requests[0]
    assert moved.num_computed_tokens == 20 and moved.token_ids == request.token_ids[:21]
    house.add("s", range(3), 2)
    house.run()
    assert prefill.steps[-1].finished_ids == ["r"], "the lane that lost the request is told so"


def test_prefix_hits_only_after_the_step_that_fills():
    house = House({"m": (group(),)}, lanes=(LaneConfig(depth=2),), num_slabs=16, max_num_batched_tokens=17)
    first = house.add("first", range(17), 2)
    second = house.add("second", range(17), 2)
    house.run()
    assert second.num_cached_tokens == 0, "the first one's prompt was still in flight"
    third = house.add("third", range(17), 2)
    house.run()
    assert third.num_cached_tokens == 16
    assert first.output_token_ids == second.output_token_ids == third.output_token_ids == house.expected(third)
    for fields in ({"tenant": "other"}, {"adapter_id": 1}, {"sampling": {"prompt_logprobs": 1}}):
        other = house.add("other", range(17), 2, **fields)
        house.run()
        assert other.num_cached_tokens == 0


def test_a_whole_prompt_hit_still_computes_one_token():
    house = House({"m": (group(),)}, num_slabs=16)
    for name in "ab":
        request = house.add(name, range(16), 3)
        house.run()
    assert request.num_cached_tokens == 12
    assert request.output_token_ids == house.expected(request)


def test_stops():
    house = House({"m": (group(),)}, num_slabs=16)
    tokens = house.expected(house.add("plain", range(9), 12))
    cases = [
        ({"eos_token_ids": frozenset({tokens[4]})}, {}, 5, "stop", None),
        ({"eos_token_ids": frozenset({tokens[4]})}, {"ignore_eos": True}, 12, "length", None),
        ({}, {"stop_token_ids": [tokens[2]]}, 3, "stop", tokens[2]),
        ({"eos_token_ids": frozenset({tokens[4]})}, {"min_tokens": 6}, 12, "length", None),
        ({}, {"stop_token_ids": [tokens[2]], "min_tokens": 3}, 3, "stop", tokens[2]),
    ]
    for index, (fields, sampling, count, reason, stop) in enumerate(cases):
        request = house.add(f"r{index}", range(9), 12, sampling=sampling, **fields)
        house.run()
        assert (request.output_token_ids, request.finish_reason, request.stop_reason) == (tokens[:count], reason, stop), index


def test_max_model_len_ends_a_request():
    house = House({"m": (group(),)}, num_slabs=16, max_position=20)
    request = house.add("r", range(9), max_tokens=None)
    house.run()
    assert len(request.token_ids) == 20 and request.finish_reason == "length"


def test_an_error_fails_its_request_only():
    house = House({"m": (group(),)}, num_slabs=16)
    house.executors[0][1].bad_requests.add("bad")
    bad, good = house.add("bad", range(9)), house.add("good", range(9))
    house.run()
    assert (bad.finish_reason, bad.error) == ("error", "told to fail")
    assert good.output_token_ids == house.expected(good)
    again = house.add("again", range(9))
    house.run()
    assert again.output_token_ids == house.expected(again)


def test_a_stop_string_ends_a_request():
    class Processor:
        def append(self, request, token_ids, logprobs, prompt_logprobs):
            return "stop!" if request.num_output_tokens >= 3 else None

    house = House({"m": (group(),)}, lanes=(LaneConfig(depth=2),))
    house.engine._output_processor = Processor()
    request = house.add("r", range(9), 12)
    short = house.add("s", range(9), 3)
    house.run()
    assert (request.num_output_tokens, request.finish_reason, request.stop_reason) == (3, "stop", "stop!")
    assert (short.finish_reason, short.stop_reason) == ("stop", "stop!")


def test_what_cannot_be_served_is_refused():
    house = House({"m": (group(),)}, num_slabs=8, slab_bytes=4096)  # 128 blocks of 4 tokens
    with pytest.raises(InvalidRequest, match="max_model_len is 256"):
        house.add("x", range(300))
    with pytest.raises(InvalidRequest, match="empty"):
        house.add("x", [])
    with pytest.raises(InvalidRequest, match="unknown model 'no'"):
        house.add("x", [1], model="no")
    house.engine.set_quota("m", 2 * 4096)
    with pytest.raises(InvalidRequest, match="which holds 129 tokens; shorten the prompt"):
        house.add("x", range(128), 100)
    house.add("x", range(100), 29)
    with pytest.raises(InvalidRequest, match="'x' is in use"):
        house.add("x", [1])
    house.run()
    with pytest.raises(OutOfMemory, match="set max_model_len to at most 513 or kv_cache_memory to at least"):
        house.engine.add_model(ModelConfig(model="big", max_model_len=5000), model_spec(), (group(),))
    with pytest.raises(InvalidParameter, match="every request needs both"):
        House({}, lanes=(LaneConfig(phases=frozenset({"decode"})),))


def test_a_default_max_model_len_is_lowered_to_what_fits():
    house = House({"m": (group(),)}, num_slabs=2, max_position=256)
    assert house.engine.models["m"].scheduler.max_model_len == 2 * 8 * 4 + 1
    request = house.add("r", range(9), max_tokens=None)
    house.run()
    assert len(request.token_ids) == 65 and request.output_token_ids == house.expected(request)


def test_models_come_and_go():
    house = House({"m": (group(),)}, lanes=TWO_LANES)
    house.add("a", range(9), 30)
    house.load("n", (group(8, layers=2),))
    kept = house.add("b", range(9), 5, model="n")
    for _ in range(4):
        house.engine.step(0.0)
    house.engine.remove_model("m")
    with pytest.raises(InvalidRequest, match="unknown model 'm'; loaded: n"):
        house.add("c", [1])
    updates = house.run()
    assert any(u.request.request_id == "a" and u.request.finish_reason == "abort" for u in updates)
    assert kept.output_token_ids == house.expected(kept)
    house.engine.remove_model("n")
    assert house.arena.num_free_slabs == house.arena.num_slabs


def test_a_request_that_kills_lanes_is_given_up():
    house = House({"m": (group(),)}, die_at={"main": [{0}, {0}, {0}]})
    request = house.add("r", range(9))
    house.run()
    assert request.finish_reason == "error" and "told to die" in request.error


def test_no_lane_left_fails_requests_with_the_cause():
    house = House({"m": (group(),)}, lanes=TWO_LANES, die_at={"d": [{1}]})

    def refuse(config):
        raise ExecutorDied("no cores left")

    house.engine.lanes[1]._make_executor = refuse
    request = house.add("r", range(9))
    updates = house.run()
    assert request.finish_reason == "error" and "told to die" in request.error
    assert updates[-1].request is request
    with pytest.raises(ExecutorDied, match="no cores left"):
        house.add("s", range(9))


def test_an_idle_lane_that_dies_is_started_again():
    house = House({"m": (group(),)})
    house.executors[0][1].is_alive = False
    house.engine.step(0.0)
    assert len(house.executors) == 2 and house.executors[0][1].is_shut_down
    request = house.add("r", range(9))
    house.run()
    assert request.output_token_ids == house.expected(request)


def test_shutdown_twice():
    house = House({"m": (group(),)}, lanes=TWO_LANES)
    house.engine.shutdown()
    house.engine.shutdown()
    assert all(executor.is_shut_down for _, executor in house.executors)
    with pytest.raises(ExecutorDied, match="shut down"):
        house.add("r", [1])


def test_a_lane_may_serve_some_models_only():
    lanes = (LaneConfig(name="a", models=("m",)), LaneConfig(name="b", models=("n",)))
    house = House({"m": (group(),), "n": (group(8),)}, lanes=lanes)
    requests = [house.add(name, range(9), model=name) for name in "mn"]
    house.run()
    check(house, requests)
    assert [{step.model for step in executor.steps} for _, executor in house.executors] == [{"m"}, {"n"}]
    with pytest.raises(InvalidParameter, match="no lane takes prefill"):
        house.load("o", (group(),))


def test_models_take_turns():
    house = House({"m": (group(),), "n": (group(),)}, num_slabs=16)
    for name in "mn":
        house.add(name, range(4), 6, model=name)
    house.run()
    assert [step.model for step in house.executors[0][1].steps] == ["m", "n"] * 6


def test_unchunked_prefill_takes_whole_prompts():
    with pytest.raises(InvalidParameter, match="must be at least max_model_len"):
        House({"m": (group(),)}, max_num_batched_tokens=64, enable_chunked_prefill=False)
    house = House({"m": (group(),)}, num_slabs=32, max_position=40, max_num_batched_tokens=40, enable_chunked_prefill=False)
    requests = [house.add(str(i), p) for i, p in enumerate(prompts(6, longest=30))]
    house.run()
    check(house, requests)
    steps = house.executors[0][1].steps
    firsts = [step.num_scheduled_tokens[new.request_id] + new.num_computed_tokens for step in steps for new in step.new_requests]
    assert firsts == [r.num_prompt_tokens for r in requests]


def test_lanes_are_checked():
    with pytest.raises(InvalidParameter, match="phases must be some of decode, prefill"):
        LaneConfig(phases=frozenset({"encode"}))
    with pytest.raises(InvalidParameter, match="depth must be a positive integer"):
        LaneConfig(depth=0)
    with pytest.raises(InvalidParameter, match="two lanes have the same name"):
        EngineConfig(models=(ModelConfig(model="m"),), lanes=(LaneConfig(), LaneConfig()))


def test_an_unknown_policy_is_named():
    with pytest.raises(Unsupported, match="known: fcfs, priority"):
        House({"m": (group(),)}, policy="lottery")
    assert SchedulerConfig().policy == "fcfs"
