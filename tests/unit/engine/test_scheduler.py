"""Single decisions of the scheduler, with steps ended by hand; and how much a decision does."""

import sys

from apportion.core.config import LaneConfig, SchedulerConfig
from apportion.core.kv_spec import KV_FORMATS, KVGroupSpec
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import KVOpKind, ModelRunnerOutput
from apportion.engine.scheduler import Scheduler
from apportion.kvcache.arena import Arena, choose_slab_bytes
from apportion.kvcache.kv_cache_manager import KVCacheManager
from tests.unit.engine.house import House, group

BOTH = frozenset({"prefill", "decode"})

FULL = (group(),)


def scheduler(groups=FULL, num_slabs=4, **config):
    kv = KVCacheManager(Arena(num_slabs * 2048, 2048), "m", groups)
    return Scheduler("m", SchedulerConfig(**config), kv, 256)


def add(scheduler, request_id, num_tokens, max_tokens=8, first=0):
    request = Request(request_id, "m", list(range(first, first + num_tokens)), SamplingParams(max_tokens=max_tokens))
    scheduler.add(request)
    return request


def end(scheduler, step, token=7):
    tokens = {request.request_id: [token] for request, _, samples, _ in step.rows if samples}
    return scheduler.update(step, ModelRunnerOutput(step.step_id, "m", tokens))


def test_decodes_come_first_and_prefill_takes_what_is_left():
    s = scheduler(max_num_batched_tokens=10)
    add(s, "a", 4)
    end(s, s.schedule(0, BOTH))
    add(s, "b", 14, first=100)
    assert s.schedule(0, BOTH).output.num_scheduled_tokens == {"a": 1, "b": 9}
    assert s.schedule(0, BOTH).output.num_scheduled_tokens == {"a": 1, "b": 5}, "the next step is scheduled before this one has ended"


def test_a_step_ahead_stops_where_the_request_must_end():
    s = scheduler()
    request = add(s, "a", 4, max_tokens=2)
    first, second = s.schedule(0, BOTH), s.schedule(0, BOTH)
    assert s.schedule(0, BOTH) is None
    assert second.output.cached_requests[0].num_computed_tokens == 4
    end(s, first)
    end(s, second)
    assert request.finish_reason == "length" and request.output_token_ids == [7, 7]


def test_the_deltas_say_only_what_changed():
    s = scheduler((group(), group(window=5)))
    add(s, "a", 7)
    step = s.schedule(0, BOTH)
    assert [len(table) for table in step.output.new_requests[0].block_tables] == [2, 2]
    end(s, step)
    told = []
    for _ in range(6):
        step = s.schedule(0, BOTH)
        (known,) = step.output.cached_requests
        told.append((known.num_computed_tokens, [len(b) for b in known.new_blocks], known.freed_blocks))
        end(s, step)
    assert told == [(7, [], ()), (8, [1, 1], (0, 1)), (9, [], ()), (10, [], ()), (11, [], ()), (12, [1, 1], (0, 2))]


def test_blocks_about_to_come_back_are_waited_for():
    s = scheduler(num_slabs=1)  # 8 blocks of 4 tokens
    s._growth = 0.0
    a, b, c = add(s, "a", 8), add(s, "b", 12, first=100), add(s, "c", 12, first=200)
    prefill = s.schedule(0, BOTH)
    s.finish(c, "abort")
    assert s.kv.num_draining == 3
    assert s.schedule(0, BOTH) is None, "`a` and `b` need a block each, and three drain"
    end(s, prefill)
    assert [r.request_id for r, *_ in s.schedule(0, BOTH).rows] == ["a", "b"]
    assert a.num_preemptions == b.num_preemptions == 0


def test_the_last_in_order_is_preempted_for_an_earlier_one():
    s = scheduler(num_slabs=1)
    s._growth = 0.0
    a, b = add(s, "a", 12, max_tokens=12), add(s, "b", 12, max_tokens=12)
    while not a.is_finished:
        end(s, s.schedule(0, BOTH))
    assert (a.num_preemptions, b.num_preemptions, a.num_output_tokens) == (0, 1, 12)
    while not b.is_finished:
        end(s, s.schedule(0, BOTH))
    assert b.num_output_tokens == 12


def test_preemptions_are_rare_in_short_memory():
    s = scheduler(num_slabs=32)  # 1024 tokens
    for index in range(60):
        add(s, str(index), 20 + index % 30, max_tokens=20 + 7 * index % 100, first=60 * index)
    num_tokens = 0
    while s.has_unfinished:
        step = s.schedule(0, BOTH)
        num_tokens += step.output.total_tokens
        end(s, step)
    needed = sum(20 + index % 30 + 20 + 7 * index % 100 - 1 for index in range(60))
    assert 0 < s.metrics.num_preemptions < 20
    assert num_tokens < 1.1 * needed, "little is computed twice"


def test_scattered_cached_blocks_do_not_keep_a_group_from_its_slab():
    s = scheduler((group(), group()), num_slabs=2)
    pool = s.kv.pools[0]
    entries = pool.allocate(16)  # both slabs
    for index, entry in enumerate(entries):
        pool.publish(entry, b"%d" % index)
    pool.release([entry for pair in zip(entries[:8], entries[8:], strict=True) for entry in pair])
    add(s, "a", 8)
    assert s.schedule(0, BOTH) is not None


def test_a_moved_block_is_copied_before_anyone_reads_it():
    house = House({"m": (group(),)}, num_slabs=16, max_num_batched_tokens=64)
    requests = [house.add(str(i), range(i, i + 9), max_tokens=20) for i in range(12)]  # 3 blocks each: 36 of 5 slabs
    for _ in range(4):
        house.engine.step(0.0)
    for request in requests:
        if int(request.request_id) % 3:
            house.engine.abort(request.request_id)
    scheduler = house.engine.models["m"].scheduler
    pool = scheduler.kv.pools[0]
    held = len(list(pool.slabs))
    assert house.engine.reclaim("m", 100 * house.arena.slab_bytes) > 0
    house.engine.step(0.0)
    assert len(list(pool.slabs)) < held
    ops = [op for step in house.executors[0][1].steps for op in step.kv_ops]
    assert ops and all(op.kind is KVOpKind.MOVE for op in ops)
    targets = {op.dst for op in ops}
    assert not targets & {op.src for op in ops}, "nothing is moved twice in a step"
    house.run()
    assert all(r.output_token_ids == house.expected(r) for r in requests[::3])


def test_a_slab_that_took_moved_blocks_in_is_not_emptied_in_the_same_step():
    s = scheduler(num_slabs=4)
    requests = [add(s, str(i), 4, max_tokens=2) for i in range(24)]  # 1 block each, 3 slabs
    end(s, s.schedule(0, BOTH))
    for slab_of in (requests[1:8], requests[9:16], requests[18:24]):  # 1, 1 and 2 blocks stay
        for request in slab_of:
            s.finish(request, "abort")
    s.kv.drop_cached()
    assert s.reclaim(3 * 2048) >= 2048
    ops = s.schedule(0, BOTH).output.kv_ops
    assert not {op.dst for op in ops} & {op.src for op in ops}


def test_what_a_waiting_move_writes_is_not_given_to_others():
    s = scheduler(num_slabs=4)
    requests = [add(s, str(i), 4, max_tokens=9) for i in range(16)]
    end(s, s.schedule(0, BOTH))
    for request in requests[1:8]:
        s.finish(request, "abort")
    s.kv.drop_cached()
    s.finish(requests[9], "abort")
    s.kv.drop_cached()
    assert s.reclaim(2048) == 2048
    target = s._moves.ops[0].dst
    s.finish(requests[0], "abort")
    assert s.kv.num_draining == 2, "source and destination of the copy"
    step = s.schedule(0, BOTH)
    assert step.output.kv_ops[0].dst == target and s.kv.num_draining == 2
    end(s, step)
    assert s.kv.num_draining == 0


def test_moved_blocks_are_hit_again():
    house = House({"m": (group(),)}, num_slabs=16)
    filler = house.add("filler", range(500, 528), max_tokens=4)
    first = house.add("first", range(17), max_tokens=30)
    house.add("more", range(300, 330), max_tokens=30)
    while not filler.is_finished:
        house.engine.step(0.0)
    house.engine.models["m"].scheduler.kv.drop_cached()
    before = house.engine.models["m"].scheduler.kv.tables(first)
    house.engine.reclaim("m", 2**20)
    assert house.engine.models["m"].scheduler.kv.tables(first) != before
    house.engine.step(0.0)
    again = house.add("again", range(17), max_tokens=3)
    house.run()
    assert again.num_cached_tokens == 16
    assert again.output_token_ids == house.expected(again) and first.output_token_ids == house.expected(first)


def test_depth_hides_the_wait():
    """With two steps in flight the second decode is submitted before the first one's token is known."""
    house = House({"m": (group(),)}, lanes=(LaneConfig(depth=2),))
    request = house.add("r", range(5), max_tokens=6)
    house.engine.step(0.0)
    assert len(house.executors[0][1].steps) == 2 and request.num_output_tokens == 1
    house.run()
    assert request.output_token_ids == house.expected(request)


def test_a_step_of_256_decodes_does_little_for_each():
    """What it takes is measured by the benchmarks; here its Python calls are counted, which no other work disturbs."""
    spec = KVGroupSpec(tuple(range(16)), 4, 64, 64, KV_FORMATS["bfloat16"], 32)
    kv = KVCacheManager(Arena(2**33, choose_slab_bytes([spec.block_bytes], 2**33)), "m", (spec,))
    s = Scheduler("m", SchedulerConfig(), kv, 2048)
    for index in range(256):
        add(s, str(index), 8, max_tokens=1000)
    end(s, s.schedule(0, BOTH))
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step = s.schedule(0, BOTH)
        end(s, step)
    finally:
        sys.setprofile(None)
    assert step.output.total_tokens == 256
    assert calls < 10 * 256


def test_a_recomputed_prompt_tells_its_logprobs_once():
    s = scheduler(num_slabs=1, max_num_batched_tokens=8)
    s._growth = 0.0
    first = add(s, "first", 12, max_tokens=20)
    request = Request("r", "m", list(range(100, 116)), SamplingParams(max_tokens=4, prompt_logprobs=1))
    s.add(request)
    told = []
    while not request.is_finished:
        step = s.schedule(0, BOTH)
        starts = {r.request_id: r.num_computed_tokens for r in [*step.output.new_requests, *step.output.cached_requests]}
        output = ModelRunnerOutput(step.step_id, "m", {r.request_id: [7] for r, _, samples, _ in step.rows if samples})
        if "r" in starts:
            start, count = starts["r"], step.output.num_scheduled_tokens["r"]
            output.prompt_logprobs["r"] = list(range(start + 1, min(start + count, 15) + 1))  # positions stand for entries
        for update in s.update(step, output):
            told += update.prompt_logprobs
    assert first.is_finished and request.num_preemptions == 1
    assert told == list(range(1, 16))
