"""The record that other rooms read: it survives its JSON, and a file that is none is named."""

from __future__ import annotations

import json

import pytest

from apportion.core.errors import InvalidParameter
from apportion.evaluate.report import Report
from apportion.evaluate.statistics import Estimate, wilson


def make_report():
    return Report(
        task="compare",
        subject={"model": "m", "weight_bytes": 12},
        metrics={"nll_difference": Estimate(0.5, 0.25, None, 0.95, "bca", 100, 7), "kl_max": Estimate(1.5, num=3)},
        floor={"nll_difference": wilson(1, 3)},
        loss="nll_difference",
        wall_s=2.0,
        num_tokens=50,
        samples=[{"item": 1}],
    )


def test_it_survives_its_json(tmp_path):
    report = make_report()
    report.write(tmp_path / "report.json")
    read = Report.read(tmp_path / "report.json")
    assert read.as_dict() == report.as_dict() and read.metrics == report.metrics and read.floor == report.floor
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["tokens_per_s"] == 25.0 and content["format"] == "apportion-report" and content["environment"]["numpy"]
    assert "samples" not in content  # they stand beside it


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "other"}, {"metrics": 5}, {"metrics": {"nll": {"val": 1}}}])
def test_what_is_no_report_is_refused(tmp_path, change):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(make_report().as_dict() | change))
    with pytest.raises(InvalidParameter, match=r"report\.json is no report"):
        Report.read(path)


def test_a_report_needs_its_parts(tmp_path):
    content = make_report().as_dict()
    del content["subject"]
    with pytest.raises(InvalidParameter, match="without subject"):
        Report.from_dict(content)
    with pytest.raises(InvalidParameter, match="is no report"):
        Report.read(tmp_path / "none.json")


def test_numbers_that_are_none_cannot_hide_in_json(tmp_path):
    report = make_report()
    report.metrics["kl_max"] = Estimate(float("nan"))
    with pytest.raises(ValueError):
        report.write(tmp_path / "report.json")
