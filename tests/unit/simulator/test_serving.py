"""Serving in simulated time: closed forms of a step's cost, and the engine's own scheduler under a clock that jumps."""

from dataclasses import dataclass, replace

import pytest

from apportion.core.config import CacheConfig, SchedulerConfig
from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import LatentSpec, MoeSpec
from apportion.simulator.cost.model import Roofline
from apportion.simulator.executor import Arrival, serve
from apportion.simulator.models.library import decoder
from apportion.simulator.serving import Decoder, Row, StepCost, StepFit, experts_touched
from apportion.simulator.topology import topology

LLAMA, _ = decoder("llama-3-8b")
IDEAL = (Roofline(matmul=1.0, attention=1.0, memory=0.8, overhead_s=0.0, tail=False),)


@dataclass
class Fixed:
    """Every step takes the same time, or as long as it has tokens."""

    per_step: float = 0.0
    per_token: float = 0.0

    def step(self, rows):
        return StepCost(self.per_step + self.per_token * sum(r.tokens for r in rows), 0.0, {}, False)


def test_bytes_of_kv_per_token():
    h200 = topology("dgx-h200")
    assert Decoder(LLAMA, h200).kv_bytes_per_token == 131072
    assert Decoder(decoder("llama-2-7b")[0], h200).kv_bytes_per_token == 524288
    latent = replace(LLAMA, num_layers=61, latent=LatentSpec(512, 1536, 128, 64, 128))
    assert Decoder(latent, h200).kv_bytes_per_token == Decoder(latent, h200, tp=8).kv_bytes_per_token == 70272
    assert Decoder(LLAMA, h200, tp=8).kv_bytes_per_token == Decoder(LLAMA, h200, tp=16 // 2).kv_bytes_per_token == 131072 / 8
    assert Decoder(LLAMA, h200, kv_dtype="float8_e4m3fn").kv_bytes_per_token == 65536
    assert Decoder(LLAMA, h200).kv_capacity() == pytest.approx((141e9 * 0.9 - 16.06e9 - 2e9) / 131072, rel=0.01)
    with pytest.raises(InvalidParameter, match=r"141.* GB of weights per device, rtx-4090 has"):
        Decoder(decoder("llama-3-70b")[0], topology("4x-rtx-4090")).kv_capacity()


def test_a_decode_reads_all_weights():
    """Llama-3-8B in 16 bits on an H200 at 0.8 of 4.8 TB/s: 16.06 GB less the embedding table take no less than 3.9 ms."""
    step = Decoder(LLAMA, topology("dgx-h200"), providers=IDEAL).step([Row(1, 0)])
    floor = (16.06e9 - 128256 * 4096 * 2) / (0.8 * 4.8e12)
    weights = sum(step.parts[name] for name in ("projections", "mlp", "head"))
    assert weights == pytest.approx(floor, rel=0.01) and step.seconds > floor
    eight_bits = Decoder(LLAMA, topology("dgx-h200"), providers=IDEAL, weight_dtype="float8_e4m3fn").step([Row(1, 0)])
    less = sum(eight_bits.parts[name] for name in ("projections", "mlp"))
    assert less == pytest.approx((weights - step.parts["head"]) / 2, rel=0.01), "half the bytes; the head stays in 16 bits"
    assert eight_bits.parts["head"] == step.parts["head"]


def test_experts_that_a_batch_touches():
    assert [round(experts_touched(256, 8, n)) for n in (1, 16, 128)] == [8, 102, 252]
    moe = replace(LLAMA, moe=MoeSpec(64, 2, 2048, tuple(range(32))))
    one, many = (Decoder(moe, topology("dgx-h100"), providers=IDEAL).step([Row(1, 0)] * n).parts["experts"] for n in (1, 64))
    assert 20 < many / one < 32


def test_tables_price_what_was_measured():
    served = Decoder(LLAMA, topology("dgx-h200"))
    inside = served.step([Row(1, 1000)] * 32 + [Row(512, 0)])
    assert not inside.extrapolated and inside.spread < 0.1
    assert served.step([Row(1, 100_000)] * 512).extrapolated
    parts = Decoder(LLAMA, topology("dgx-h200"), tp=8).step([Row(1, 1000)] * 32).parts
    assert parts["communication"] > 0 and set(parts) >= {"projections", "mlp", "attention", "norms", "head", "host"}
    assert served.step([Row(2048, 0)]).seconds > 4 * served.step([Row(256, 0)]).seconds
    with pytest.raises(InvalidParameter, match="at least one row"):
        served.step([])
    with pytest.raises(InvalidParameter, match="32 attention heads cannot be cut into 5"):
        Decoder(LLAMA, topology("dgx-h200"), tp=5)


def test_a_fit_finds_what_made_the_steps():
    rows = (
        [[Row(1, 100)] * n for n in (1, 4, 16, 32)]
        + [[Row(t, 0)] for t in (64, 128, 256, 512)]
        + [[Row(64, 256)], [Row(1, 50)] * 3 + [Row(128, 0)]]
    )

    def truth(batch):
        tokens = sum(r.tokens for r in batch)
        pairs = sum(r.tokens * r.context + r.tokens * (r.tokens + 1) / 2 for r in batch)
        return 1e-3 + 2e-5 * tokens + 1e-4 * len(batch) + 3e-8 * pairs

    fit = StepFit.of([(batch, truth(batch)) for batch in rows])
    for batch in ([Row(1, 300)] * 8, [Row(200, 100), Row(1, 40)]):
        assert fit.step(batch).seconds == pytest.approx(truth(batch), rel=0.02) and not fit.step(batch).extrapolated
    assert fit.step([Row(1, 100)] * 100).extrapolated and fit.spread < 0.05
    with pytest.raises(InvalidParameter, match="3 measured steps are too few"):
        StepFit.of([(batch, 1.0) for batch in rows[:3]])


def test_a_fit_of_noisy_steps_is_their_mean():
    """Not below it, as least squares of errors relative to the measured times would be: here by a quarter."""
    import random

    draw = random.Random(1)
    batches = [[Row(1, 100)] * n for n in (1, 2, 4, 8) for _ in range(500)] + [
        [Row(t, 0, samples=False)] for t in (64, 128) for _ in range(500)
    ]
    steps = [(batch, (1e-3 + 2e-5 * sum(r.tokens for r in batch)) * draw.choice((0.6, 1.4))) for batch in batches]
    fit = StepFit.of(steps)
    for rows in ([Row(1, 100)], [Row(1, 100)] * 8, [Row(128, 0, samples=False)]):
        assert fit.step(rows).seconds == pytest.approx(1e-3 + 2e-5 * sum(r.tokens for r in rows), rel=0.05)
    assert 0.3 < fit.spread < 0.7
    only_prompts = [step for step in steps if not step[0][0].samples]
    assert StepFit.of(only_prompts).step(only_prompts[0][0]).seconds > 0


def test_one_request_takes_its_steps():
    """A prompt of 100 in chunks of 64: two steps; then a step per further token."""
    day = serve([Arrival(0.0, 100, 5)], LLAMA, Fixed(0.01), 2**30, scheduler=SchedulerConfig(max_num_batched_tokens=64))
    (one,) = day.served
    assert one.ttft == pytest.approx(0.02) and one.finish_s == pytest.approx(0.06) and one.tpot == pytest.approx(0.01)
    assert day.busy == pytest.approx(0.06)


def test_batches_share_their_steps_and_arrivals_wait_for_the_step_that_runs():
    day = serve([Arrival(0.0, 10, 11), Arrival(0.025, 10, 11)], LLAMA, Fixed(0.01), 2**30, depth=1)
    by_start = sorted(day.served, key=lambda s: s.arrival.at_s)
    assert by_start[0].finish_s == pytest.approx(0.11)
    assert by_start[1].first_token_s == pytest.approx(0.04), "it comes during the third step and joins the fourth"
    assert day.seconds == pytest.approx(0.14)
    idle = serve([Arrival(0.0, 10, 2), Arrival(5.0, 10, 2)], LLAMA, Fixed(0.01), 2**30)
    assert idle.seconds == pytest.approx(5.02) and idle.busy == pytest.approx(0.04)


def test_a_queue_of_single_prefills_is_m_d_1():
    """D = 0.1 s, 5 requests a second: TTFT 0.150 s (A11)."""
    import random

    draw, at, work = random.Random(3), 0.0, []
    for _ in range(4000):
        at += draw.expovariate(5.0)
        work.append(Arrival(at, 10, 1))
    day = serve(
        work, LLAMA, Fixed(0.1), 2**30, scheduler=SchedulerConfig(max_num_seqs=1), depth=1, cache=CacheConfig(enable_prefix_caching=False)
    )
    assert sum(s.ttft for s in day.served) / len(day.served) == pytest.approx(0.150, rel=0.08)


def test_memory_that_is_short_preempts_as_in_the_engine():
    work = [Arrival(0.0, 64, 200) for _ in range(12)]
    plenty = serve(work, LLAMA, Fixed(0.0, 1e-4), 2**30)
    short = serve(work, LLAMA, Fixed(0.0, 1e-4), 1536 * 131072)
    assert plenty.num_preemptions == 0 < short.num_preemptions and short.seconds > plenty.seconds
    assert len(short.served) == 12 and plenty.tokens_per_s > short.tokens_per_s


def test_a_closed_loop_keeps_so_many_inside():
    day = serve([Arrival(0.0, 10, 10) for _ in range(8)], LLAMA, Fixed(0.01), 2**30, max_concurrency=2, depth=1)
    assert max(s.latency for s in day.served) == pytest.approx(0.1) and day.seconds == pytest.approx(0.4)
    shared = [Arrival(0.0 if i == 0 else 10.0 * i, 256, 2, tuple(range(256))) for i in range(2)]
    again = serve(shared, LLAMA, Fixed(0.0, 1e-3), 2**30)
    assert sorted(s.ttft for s in again.served)[0] < 0.05, "the second finds its prefix in the cache"
    with pytest.raises(InvalidParameter, match="at least one prompt"):
        serve([], LLAMA, Fixed(), 2**30)
