"""Choices by measured intervals: wins must exceed the noise, beyond what was measured the library multiplies, other devices are refused."""

import json
import logging
import math

import pytest

from apportion.core.errors import InvalidParameter
from apportion.kernels import interval_table
from apportion.kernels.cpu import KERNELS
from apportion.kernels.interval_table import LIBRARY, SWITCH, Choice, Intervals, IntervalTable, device_slug, shipped, shipped_path

FLAT, SPLIT = Choice("flat", 1, 1), Choice("flat", 0, 4)
MEASURED = [(1, 10.0, 7.0, SPLIT), (2, 10.0, 7.5, SPLIT), (4, 10.0, 8.0, FLAT), (16, 10.0, 9.9, FLAT), (32, 10.0, 9.0, FLAT)]


def table(device="nvidia-h200"):
    return IntervalTable(device, {"torch": "2.11", "triton": "3.6.0"}, {("bfloat16", 4096, 4096): Intervals.of(MEASURED)})


def test_intervals_keep_wins_beyond_the_noise():
    found = Intervals.of(MEASURED)
    chosen = {tokens: found.at(tokens) for tokens in (1, 2, 3, 4, 15, 16, 31, 32, 33, 5000)}
    assert [chosen[t] for t in (1, 2, 3)] == [SPLIT] * 3 and [chosen[t] for t in (4, 15)] == [FLAT] * 2
    assert [chosen[t] for t in (16, 31)] == [LIBRARY] * 2, "a win of 1 % is none, however it continues"
    assert chosen[32] == FLAT and [chosen[t] for t in (33, 5000)] == [LIBRARY] * 2
    with pytest.raises(InvalidParameter, match="at least one measurement"):
        Intervals.of([])


def test_a_table_survives_json_and_is_for_one_device():
    data = json.loads(json.dumps(table().as_dict()))
    assert IntervalTable.from_dict(data, "nvidia-h200").rows == table().rows
    with pytest.raises(InvalidParameter, match="of nvidia-h200 was given for nvidia-h100"):
        IntervalTable.from_dict(data, "nvidia-h100")
    with pytest.raises(InvalidParameter, match="format"):
        IntervalTable.from_dict({**data, "format": "other"}, "nvidia-h200")


@pytest.mark.parametrize("path", sorted(shipped_path("x").parent.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_table_is_of_these_kernels_and_its_choices_cost_little(path):
    found = IntervalTable.from_dict(json.loads(path.read_text()), path.stem)
    assert found.rows and (path.stem.startswith("nvidia") or found.versions["cpu kernels"] == KERNELS)
    for row in found.rows.values():
        for tokens, us in row.us.items():
            best = min(time for name, time in us.items() if name != "library")
            assert us[row.at(int(tokens)).kernel] <= math.exp(2 * SWITCH) * best, "what the rule promises"


def test_explain_prints_the_measured_row():
    assert "library 10.0 us, flat 8.0 us" in table().explain("bfloat16", 4096, 4096, 5)
    assert "at 5 tokens: flat (tile 1, 1 splits); measured at 4 tokens" in table().explain("bfloat16", 4096, 4096, 5)
    assert "was not measured on nvidia-h200: the library multiplies" in table().explain("bfloat16", 1, 2, 5)


def test_shipped_tables_are_read_by_device_and_other_versions_are_said(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "tables" / "dispatch"
    folder.mkdir(parents=True)
    (folder / "nvidia-h200.json").write_text(json.dumps(table().as_dict()))
    monkeypatch.setattr(interval_table, "files", lambda package: tmp_path)
    with caplog.at_level(logging.WARNING, "apportion"):
        assert shipped("nvidia-h200", {"torch": "2.11", "triton": "3.6.0"}).rows == table().rows and not caplog.text
        shipped("nvidia-h200", {"torch": "2.12", "triton": "3.6.0"})
    assert "measured with torch 2.11, this is 2.12" in caplog.text
    assert not shipped("nvidia-h100-80gb-hbm3", {}).rows
    assert device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
