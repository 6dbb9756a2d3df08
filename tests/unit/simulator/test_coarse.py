"""A pipeline as stages is held to the same pipeline as operators: times within a few percent, memory within fifteen."""

from dataclasses import replace

import pytest

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.simulator.coarse import coarse
from apportion.simulator.cost.model import CostModel
from apportion.simulator.plan import Plan, Workload, fine
from apportion.simulator.run import simulate
from apportion.simulator.topology import topology
from tests.papers.proteus import SPEC

SMALL = replace(
    SPEC,
    num_layers=4,
    hidden=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    ffn=8192,
    vocab=8000,
    windows=(None,) * 4,
    dtype="bfloat16",
)  # fmt: skip
WORK = Workload(SMALL, 16, 1024)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(tp=4),
        Plan(dp=4),
        Plan(dp=4, zero=1),
        Plan(pp=2, tp=2, num_micro_batches=4),
        Plan(pp=2, dp=2, num_micro_batches=4, schedule="gpipe", zero=2),
        Plan(pp=4, num_micro_batches=8, recompute="full"),
        Plan(pp=2, dp=2, num_micro_batches=4, chunks=2),
        Plan(pp=2, tp=2, num_micro_batches=4, sequence_parallel=True, recompute="selective"),
    ],
    ids=str,
)
def test_stages_take_as_long_as_their_operators(plan):
    work = replace(WORK, fused_attention=plan.recompute != "selective")
    model = CostModel(topology("dgx-a100", num_devices=4))
    whole = simulate(fine(work, plan, model.topology.cluster), model, num_draws=0)
    graph, costs = coarse(work, plan, model)
    stages = simulate(graph, model, costs=costs, num_draws=0)
    assert stages.seconds == pytest.approx(whole.seconds, rel=0.06)
    assert max(stages.peak_bytes.values()) == pytest.approx(max(whole.peak_bytes.values()), rel=0.15)
    assert stages.num_tasks * 5 < whole.num_tasks


def test_what_stages_cannot_be_is_refused():
    model = CostModel(topology("dgx-a100"))
    with pytest.raises(Unsupported, match="ZeRO-3"):
        coarse(WORK, Plan(dp=2, zero=3), model)
    with pytest.raises(InvalidParameter, match="4 layers cannot be cut into 8 equal"):
        coarse(WORK, Plan(pp=8, num_micro_batches=8), model)
    with pytest.raises(InvalidParameter, match="batch of 16 cannot be cut into 3"):
        coarse(WORK, Plan(num_micro_batches=3), model)
    with pytest.raises(InvalidParameter, match="needs 16 devices, the cluster has 8"):
        coarse(WORK, Plan(dp=16), model)
    with pytest.raises(InvalidParameter, match="unknown recompute 'some'"):
        Plan(recompute="some")
