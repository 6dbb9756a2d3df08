"""Measured ways through a linear: what was timed, what is chosen, and that no choice changes a bit."""

import json
import logging

import pytest
import torch

from apportion.bench.kernels import make_ops
from apportion.evaluate import linear_profile
from apportion.evaluate.linear_profile import intervals, learn, measure, profile_linears, worst_pick
from apportion.kernels.cpu import extension
from apportion.kernels.cpu.ops import CpuOps
from apportion.kernels.interval_table import FLAT, GEMV, IntervalTable
from apportion.kernels.ops import LinearSpec
from tests.conformance.test_linear import linear
from tests.conformance.test_number_formats import made

pytestmark = pytest.mark.skipif(not extension.available(), reason="the CPU kernels are not built")


@pytest.fixture
def ops():
    threads = torch.get_num_threads()
    yield make_ops(1)
    torch.set_num_threads(threads)


def test_every_way_is_timed_and_the_library_is_never_chosen(ops, monkeypatch):
    monkeypatch.setattr(linear_profile, "COLD_BYTES", 1 << 16)
    times = measure(ops, LinearSpec(64, 96, "bfloat16"), tokens=(1, 2, 40), rounds=2)
    assert set(times) == {1, 2, 40} and set(times[1]) == {"flat", "gemv", "library"} and set(times[40]) == {"flat", "library"}
    assert all(us > 0 for ways in times.values() for us in ways.values())
    found = intervals(
        {1: {"flat": 9.0, "gemv": 5.0, "library": 0.1}, 4: {"flat": 5.0, "gemv": 4.95, "library": 0.1}, 40: {"flat": 9.0, "library": 1.0}}
    )
    assert [found.at(t) for t in (1, 3, 4, 40, 1000)] == [GEMV, GEMV, GEMV, FLAT, FLAT]
    assert found.us["1"]["library"] == 0.1


@pytest.mark.parametrize(
    "scheme", ["float32", "bfloat16", "float16", "int4_g32", "e4m3_channel", "e4m3_b128x128@e4m3_g128", "int8_channel@int8_token"]
)
def test_no_choice_changes_a_bit(ops, scheme):
    op = made(ops, scheme, 70, 300)[0] if "_" in scheme else linear(ops, 70, 300, scheme)[0]
    assert op.gemv_rows in (0, 1, 2, 12, 32) and (op.gemv_rows or scheme not in ("float32", "float16"))
    for rows in range(1, op.gemv_rows + 2):
        x, found = torch.randn(rows, 300), []
        for gemv in (0, (1 << op.gemv_rows) - 1):
            op.set_gemv(gemv)
            found.append(op(x).clone())
        assert torch.equal(*found), f"T={rows}"


def test_a_linear_takes_the_table_s_choice_and_a_missing_one_is_said_once(ops, caplog):
    spec = LinearSpec(64, 96, "bfloat16")
    table = profile_linears(ops, [spec], rounds=1)
    assert IntervalTable.from_dict(json.loads(table.to_json()), table.device).rows == table.rows
    chosen = CpuOps(ops.team, ops.isa, table)
    with caplog.at_level(logging.INFO, "apportion"):
        chosen.linear(spec)
        assert "was not measured" not in caplog.text
        chosen.linear(LinearSpec(32, 32, "bfloat16"))
        chosen.linear(LinearSpec(33, 32, "bfloat16"))
    assert caplog.text.count("was not measured") == 1
    assert "64 x 96" in chosen.explain("bfloat16", 64, 96, 5) and "us" in chosen.explain("bfloat16", 64, 96, 5)


GEMV_US, FLAT_US = [10, 10, 11, 12, 13, 14, 16, 18, 20, 22, 24, 26], [15] * 12  # at 1 .. 12 tokens: even between 6 and 7


def timed(spoiled=None):
    """(what `learn` asks, which tokens it asked for): one cell's GEMV half as slow again where `spoiled`."""
    asked = []

    def time_at(tokens):
        asked.extend(tokens)
        times = {t: {"flat": 15.0, "library": 1.0} | ({"gemv": float(GEMV_US[t - 1])} if t <= 12 else {}) for t in tokens}
        if spoiled in times:
            times[spoiled]["gemv"] *= 1.5
        return times

    return time_at, asked


def test_between_neighbours_that_disagree_is_measured_until_they_touch():
    time_at, asked = timed()
    found = learn(time_at, (1, 4, 12, 16))
    assert asked == [1, 4, 12, 16, 8, 6, 7] and set(found.us) == {str(t) for t in asked}
    assert [found.at(t) for t in (1, 5, 6, 7, 8, 12, 500)] == [GEMV] * 3 + [FLAT] * 4
    assert worst_pick(found) == 1.0


def test_one_spoiled_cell_neither_moves_the_break_nor_is_it_hidden():
    found = learn(timed(spoiled=3)[0], (1, 2, 3, 4, 5, 6, 8, 12, 16))
    assert found.breaks == (1, 7)
    assert worst_pick(found) == pytest.approx(1.1), "what the rule costs at the cell as measured"


def test_a_first_cell_that_differs_by_more_than_a_switch_costs_is_chosen_apart():
    time_at, _ = timed()

    def one_token_is_slow(tokens):
        return {t: us | ({"gemv": 16.0} if t == 1 else {}) for t, us in time_at(tokens).items()}

    found = learn(one_token_is_slow, (1, 2, 4, 8, 12, 16))
    assert [found.at(t) for t in (1, 2, 6, 7, 8)] == [FLAT, GEMV, GEMV, FLAT, FLAT] and worst_pick(found) == 1.0


def test_a_way_that_never_wins_is_never_taken():
    assert intervals({1: {"flat": 9.0, "gemv": 8.9}, 2: {"flat": 9.0, "gemv": 9.5}, 16: {"flat": 9.0}}).choices == (FLAT,)
    assert intervals({1: {"flat": 9.0, "gemv": 5.0}, 2: {"flat": 9.0, "gemv": 6.0}}).at(3) == FLAT, "beyond what was measured"


def test_rows_of_an_older_table_stay_until_measured_again(ops):
    one, two = (IntervalTable("here", {}, {("bfloat16", n, 8): intervals({1: {"flat": 2.0, "gemv": 1.0}})}) for n in (1, 2))
    assert set(two.merged_over(one.as_dict()).rows) == {("bfloat16", 1, 8), ("bfloat16", 2, 8)}
