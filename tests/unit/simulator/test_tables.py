"""Measured tables: read at their points, between, and beyond; and held to the measurements that they do not hold."""

import csv
import json
import math
import statistics

import pytest

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.simulator.cost.collective import Nccl
from apportion.simulator.cost.measured import Measured, MeasuredCollectives, best_seconds
from apportion.simulator.cost.model import CostModel, Roofline
from apportion.simulator.cost.table import FORMAT, shipped, table_of
from apportion.simulator.cost.work import Work
from apportion.simulator.topology import device, topology


def small(**changes):
    data = {"format": FORMAT, "op": "gemm", "device": "h100-sxm", "dtype": "bfloat16", "source": "by hand", "spread": 0.05, "near": False,
            "keys": ["k"], "axes": [["m", [1, 4, 16]], ["n", [8, 32]]], "rows": [[[2], [10, 40, 40, 160, None, 640]]]}  # fmt: skip
    return table_of(data | changes)


def linear(at):
    return at["m"] * at["n"] * 1e-6


def test_points_between_and_beyond():
    t = small()
    at = t.read({"m": 4, "n": 32, "k": 2}, linear)
    assert at.how == "exact" and at.seconds == pytest.approx(160e-6)
    between = t.read({"m": 2, "n": 16, "k": 2}, linear)
    assert between.how == "interpolated" and between.seconds == pytest.approx(40e-6), "a time that grows as the work does stays so"
    assert between.spread == 0.05
    for point in ({"m": 16, "n": 8, "k": 2}, {"m": 8, "n": 8, "k": 2}, {"m": 64, "n": 64, "k": 2}):
        beyond = t.read(point, linear)
        assert beyond.how == "extrapolated" and beyond.spread >= 0.25
        assert beyond.seconds == pytest.approx(1.25 * linear(point)), "as far from the best as the nearest that was measured"
    assert t.read({"m": 4, "n": 32, "k": 3}, linear) is None, "another key is another kernel"
    near = small(near=True).read({"m": 4, "n": 32, "k": 3}, linear)
    assert near.how == "interpolated" and near.spread == 0.1
    with pytest.raises(InvalidParameter, match="needs 'k'"):
        t.read({"m": 1, "n": 8}, linear)


def test_a_table_that_makes_no_sense_is_refused():
    with pytest.raises(InvalidParameter, match="has the format"):
        small(format="else")
    with pytest.raises(InvalidParameter, match="1 times for a grid of 6"):
        small(rows=[[[2], [1]]])
    with pytest.raises(InvalidParameter, match="does not rise"):
        small(axes=[["m", [4, 1, 16]], ["n", [8, 32]]])


def test_shipped_tables_say_where_they_are_from():
    assert len(shipped()) >= 15
    for table in shipped():
        assert table.fields["licence"] in ("Apache-2.0", "MIT") and table.fields["origin"].startswith("github.com/")
        assert table.fields["left_out"]["points"] > 20 and 0 < table.spread < 0.3
        device(table.device)


def test_the_chain_asks_tables_first_and_never_guesses():
    model = CostModel(topology("dgx-h200"), (Measured(), Roofline()), MeasuredCollectives())
    work = Work("gemm", "bfloat16", 2.0 * 4096**3, 6.0 * 4096**2, 4096, 4096, 4096)
    exact = model.compute(work, "gpu:0", "x")
    assert exact.source.startswith("exact: NVIDIA") and exact.seconds == pytest.approx(2 * 4096**3 / 817.8e12, rel=0.01)
    between = model.compute(Work("gemm", "bfloat16", 2.0 * 5000**3, 6.0 * 5000**2, 5000, 5000, 5000), "gpu:0", "x")
    assert between.source.startswith("interpolated") and 0.01 < between.spread < 0.1
    beyond = model.compute(Work("gemm", "bfloat16", 2.0 * 90000**3, 6.0 * 90000**2, 90000, 90000, 90000), "gpu:0", "x")
    assert beyond.source.startswith("extrapolated") and beyond.spread >= 0.25
    single = model.compute(Work("gemm", "float32", 2.0 * 4096**3, 12.0 * 4096**2, 4096, 4096, 4096), "gpu:0", "x")
    assert single.source == "roofline"
    with pytest.raises(Unsupported, match="h200-sxm has no numbers for gemm in int16"):
        model.compute(Work("gemm", "int16", 1.0, 1.0, 1, 1, 1), "gpu:0", "x")
    reduce = model.collectives.cost(model.topology, "all_reduce", [f"gpu:{i}" for i in range(8)], 512 * 2**20)
    assert "NCCL 2.29" in reduce.source and reduce.total == pytest.approx(2.04e-3, rel=0.01)
    assert all(model.topology.links[i].bytes_s / times >= reduce.rate * 0.999 for i, times in reduce.links.items())
    assert model.collectives.cost(model.topology, "all_reduce", ["gpu:0", "gpu:1", "gpu:2"], 1e6).source.startswith("nccl ")


def test_products_that_the_table_does_not_hold(shared_data):
    """A tenth of AIConfigurator's products is in the table; the others are read from it."""
    read_table = pytest.importorskip("pyarrow.parquet").read_table
    rows = read_table(shared_data("perf-h200-vllm-0.24/gemm/gemm_perf.parquet"), filters=[("gemm_dtype", "==", "bfloat16")]).to_pylist()
    table = next(t for t in shipped() if (t.device, t.op, t.dtype) == ("h200-sxm", "gemm", "bfloat16"))
    kind, errors = device("h200-sxm"), []
    for r in rows[::11]:
        found = table.read({k: r[k] for k in "mnk"}, lambda at: best_seconds("gemm", "bfloat16", at, kind))
        if found.how == "interpolated":
            errors.append(abs(math.log(found.seconds / (r["latency"] * 1e-3))))
    assert len(errors) > 2000 and statistics.mean(errors) < 0.06 and sorted(errors)[int(0.95 * len(errors))] < 0.18


def test_collectives_that_the_table_does_not_hold(shared_data):
    """The sizes that were measured on two DGX A100, read from a thirtieth of them; NCCL's model alone is five times as far off."""
    with open(shared_data("perf-vidur/network/a100_dgx/all_reduce.csv"), encoding="utf-8", newline="") as lines:
        rows = [r for r in csv.DictReader(lines) if r["num_workers"] == "16" and int(r["size"]) > 1e6]
    t = topology("dgx-a100", 2)
    errors, modelled = [], []
    for r in rows[::9]:
        seconds, size = float(r["time_stats.all_reduce.median"]) * 1e-3, int(r["size"])
        devices = [f"gpu:{i}" for i in range(16)]
        errors.append(abs(math.log(MeasuredCollectives().cost(t, "all_reduce", devices, size).total / seconds)))
        modelled.append(abs(math.log(Nccl().cost(t, "all_reduce", devices, size).total / seconds)))
    assert statistics.median(errors) < 0.06 < 0.3 < statistics.median(modelled)


def test_tables_are_json_that_can_be_diffed():
    from importlib.resources import files

    folder = files("apportion") / "kernels" / "tables"
    for file in folder.iterdir():
        if file.name.endswith(".json"):
            text = file.read_text(encoding="utf-8")
            assert len(text) < 40_000 and json.loads(text)["made_by"] == "scripts/make_cost_tables.py"
