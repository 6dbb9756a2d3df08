"""Calibration finds again what made the rows, says how far off it would have been, and chooses rows without looking at their times."""

from dataclasses import replace

import pytest

from apportion.core.errors import InvalidParameter
from apportion.simulator.cost.calibrate import WHOLE, Calibration, Parameters, Row, kendall_tau, mean_error
from apportion.simulator.models.library import decoder
from apportion.simulator.plan import Plan, Workload
from apportion.simulator.topology import topology

SPEC, GATED = decoder({"num_layers": 8, "hidden": 1024, "num_heads": 16, "ffn": 4096, "vocab": 16000, "gated": False})
WORK = Workload(SPEC, 16, 512, gated=GATED)
TRUTH = Parameters(matmul=0.25, overhead_s=40e-6, net=0.3, step_s=0.1)
PLANS = [Plan(), Plan(tp=4), Plan(dp=8), Plan(dp=16), Plan(pp=4), Plan(pp=2, dp=4), Plan(pp=2, tp=2, dp=2), Plan(pp=4, dp=4)]
UNKNOWN = {"micro_batch": {1: 1.0, WHOLE: 1.0}}


def rows(micro_batch=1):
    made = Calibration([Row("x", WORK, Plan(), topology("8x-a800", 2), 1.0)])
    found = []
    for plan in PLANS:
        row = Row(f"{plan.pp}{plan.tp}{plan.dp}", WORK, plan, topology("8x-a800", 2), 1.0)
        found.append(replace(row, seconds=made._seconds(TRUTH, row, {"micro_batch": micro_batch})))
    return found


@pytest.mark.parametrize("micro_batch", [1, WHOLE])
def test_three_rows_find_what_made_them(micro_batch):
    """Parameters, and the micro-batch that no row states: the other rows are then right."""
    made = rows(micro_batch)
    known = made[1::3]  # with deep pipelines, whose times show the micro-batch
    others = [r for r in made if r not in known]
    fit = Calibration(known, UNKNOWN).fit()
    assert fit.choice == {"micro_batch": micro_batch}
    predicted = [Calibration(known, UNKNOWN).predict(fit, row) for row in others]
    assert mean_error(predicted, [r.seconds for r in others]) < 0.06
    assert set(fit.left_out) == {r.name for r in known} and fit.spread >= 0.03
    assert max(map(abs, fit.left_out.values())) > 0.001, "two rows cannot say all that three do"
    typical = Calibration(known, UNKNOWN)._seconds(Parameters(), others[0], fit.choice)
    assert abs(typical / others[0].seconds - 1) > 0.15, "without calibration it is far off"


def test_rows_are_chosen_without_their_times():
    made = rows()
    chosen = Calibration(made, UNKNOWN).design(3)
    unseen = Calibration([replace(row, seconds=9.9) for row in made], UNKNOWN).design(3)
    assert [r.name for r in chosen] == [r.name for r in unseen] and len({r.name for r in chosen}) == 3
    plans = [r.plan for r in chosen]
    assert any(p.dp > 1 for p in plans) and any(p.dp == 1 for p in plans), "with and without gradients on the wire"


def test_orders_are_compared_where_they_differ():
    assert kendall_tau([1, 2, 3], [1, 2, 3]) == 1 and kendall_tau([3, 2, 1], [1, 2, 3]) == -1
    assert kendall_tau([2, 1, 3], [1.0, 1.02, 3]) == 1, "two percent is no order"
    assert mean_error([1.1, 0.9], [1.0, 1.0]) == pytest.approx(0.1)


def test_rows_that_say_nothing_are_refused():
    with pytest.raises(InvalidParameter, match="at least one measured row"):
        Calibration([])
    with pytest.raises(InvalidParameter, match="row 'x' has no positive measured time"):
        Calibration([Row("x", WORK, Plan(), topology("8x-a800"), 0.0)]).fit()
    with pytest.raises(InvalidParameter, match="9 rows are to be chosen out of 8"):
        Calibration(rows()).design(9)
    with pytest.raises(InvalidParameter, match="unknown model 'gpt-9'"):
        decoder("gpt-9")
    with pytest.raises(InvalidParameter, match="needs the field 'ffn'"):
        decoder({"num_layers": 8, "hidden": 1024, "num_heads": 16, "vocab": 100})
