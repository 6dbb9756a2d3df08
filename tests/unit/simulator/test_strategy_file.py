"""Questions as files: the same answers as the Python API, and one sentence with the path or name for each that makes no sense."""

import json

import pytest

from apportion.cli.main import main
from apportion.core.errors import ApportionError
from apportion.simulator import presets
from apportion.simulator.cost.measured import Measured, MeasuredCollectives
from apportion.simulator.cost.model import CostModel, Roofline
from apportion.simulator.plan import Plan, Workload, fine
from apportion.simulator.run import simulate
from apportion.simulator.strategy_file import read_question
from apportion.simulator.topology import topology

TINY = {"num_layers": 2, "hidden": 512, "num_heads": 8, "ffn": 2048, "vocab": 8000, "gated": False}
BASE = {"model": TINY, "batch": 16, "seq_len": 256, "cluster": {"node": "dgx-a100"}}


def test_a_plan_in_a_file_is_the_plan_in_python():
    plan = {"pp": 2, "dp": 2, "tp": 2, "num_micro_batches": 4, "zero": 1}
    asked = read_question(BASE | {"plan": plan, "detail": "operators"})
    spec = asked.workload.spec
    model = CostModel(topology("dgx-a100"), (Measured(), Roofline()), MeasuredCollectives())
    by_hand = simulate(fine(Workload(spec, 16, 256, gated=False), Plan(**plan), model.topology.cluster), model, batch=16, num_draws=2)
    answer = asked.answer(2)
    assert answer.seconds == by_hand.seconds and answer.samples == by_hand.samples and answer.peak_bytes == by_hand.peak_bytes
    stages = read_question(BASE | {"plan": plan, "detail": "stages"}).answer(0)
    assert stages.seconds == pytest.approx(answer.seconds, rel=0.1) and stages.num_tasks * 10 < answer.num_tasks
    for device, b in stages.breakdown.items():
        whole = answer.breakdown[device]
        assert b.exposed_communication == pytest.approx(whole.exposed_communication, rel=0.3, abs=0.05 * answer.seconds)


def test_a_tree_in_a_file_is_the_tree_in_python():
    data = BASE | {"mesh": {"dp": 4, "tp": 2}, "strategy": [
        {"at": "", "map": {}, "split": {"b": "dp"}}, {"at": "layers.*.mlp.*", "split": {}}, {"at": "", "shard": {"optimizer": "dp"}},
        {"at": "layers.*", "recompute": True}], "schedule": {"num_micro_batches": 2}}  # fmt: skip
    asked = read_question(data)
    presets.tensor_parallel(asked.tree)
    kinds = {t.kind for t in asked.answer(0).graph.tasks if t.phase in ("forward", "recompute")}
    assert {"compute", "all_reduce"} <= kinds
    graph = asked.answer(0).graph
    assert {t.phase for t in graph.tasks} == {"forward", "recompute", "backward", "optimizer"}
    for model in ({"cnn": "vgg19", "width": 0.1, "image": 64}, {"dlrm": {"num_tables": 4, "rows": 1000}}):
        whole = {"model": model, "batch": 8, "cluster": "dgx-1-v100", "mesh": {"dp": 8}, "strategy": data["strategy"][:1]}
        assert read_question(whole).answer(0).seconds > 0


def test_breakdowns_sum_to_the_step():
    for detail in ("operators", "stages"):
        answer = read_question(BASE | {"plan": {"pp": 2, "tp": 2, "dp": 2, "num_micro_batches": 2}, "detail": detail}).answer(0)
        for b in answer.breakdown.values():
            parts = (b.compute, b.exposed_communication, b.bubble, b.host)
            assert min(parts) >= 0 and sum(parts) == pytest.approx(answer.seconds)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"plan": {"tp": 16}}, "needs 16 devices, the cluster has 8"),
        ({"cluster": {"node": "dgx-a100", "num_nodes": 2}, "plan": {"tp": 16}}, "'layers.0.attn"),
        ({"plan": {"zero": 4}}, "ZeRO has stages 1, 2 and 3, not 4"),
        ({"plan": {"pq": 2}}, "plan has no field 'pq'"),
        ({"plan": {"dp": 2, "num_micro_batches": 3}}, "batch of 16 at 'embed' cannot be cut into 3"),
        ({"model": "gpt-9", "plan": {}}, "unknown model 'gpt-9'"),
        ({"cluster": "dgx-a1000", "plan": {}}, "unknown node 'dgx-a1000'"),
        ({"cluster": {"node": "dgx-a100", "num_nodes": 2, "fabric": {"a": {"nodes": [0], "parent": "b", "gb_s": 1}, "b": {"nodes": [1],
          "parent": "a", "gb_s": 1}}}, "plan": {}}, "the fabric is cyclic: a -> b -> a"),
        ({"cluster": {"node": "dgx-a100", "num_nodes": 2, "fabric": {"a": {"nodes": [0]}, "b": {"nodes": [1]}}}, "plan": {"dp": 16}},
         "not connected: no link leads from"),
        ({"dtype": "float8_e5m2", "plan": {}}, "float8_e5m2"),
        ({"strategy": [{"at": "layers.*.mpl", "map": {}}], "plan": None}, "strategy path 'layers.\\*.mpl' names nothing"),
        ({"strategy": [{"at": "", "split": {"b": "dp"}, "sharp": 1}], "plan": None}, "has no field 'sharp'"),
        ({"strategy": [{"at": "", "map": {"dp": 9}}], "plan": None}, "names|no axis|outside axis"),
        ({"plan": {"tp": "two"}}, "tp of plan must be a whole number, got 'two'"),
        ({"plan": {"bucket_mb": 0}}, "bucket_mb must be positive, got 0"),
        ({"plan": {"grad_dtype": "half"}}, "unknown grad_dtype 'half'"),
        ({"plan": []}, "plan must be a mapping of fields"),
        ({"model": 7, "plan": {}}, "model of a strategy file must be a word or a mapping, got 7"),
        ({"model": TINY | {"hidden": "wide"}, "plan": {}}, "hidden of model 'decoder' must be a whole number, got 'wide'"),
        ({"cluster": 7, "plan": {}}, "cluster of a strategy file must be a word or a mapping"),
        ({"cluster": {"node": "dgx-a100", "nics": {"count": 2}}, "plan": {}}, "nics needs the field 'gb_s'"),
        ({"cluster": {"node": "dgx-a100", "fabric": {"a": 3}}, "plan": {}}, "switch 'a' must be a mapping"),
        ({"mesh": 5, "strategy": [], "plan": None}, "mesh of a strategy file must be a mapping"),
        ({"strategy": 3, "plan": None}, "strategy of a strategy file must be a list"),
        ({"strategy": [{"at": "", "map": {}, "store": {"weight": {"v": True}}}], "plan": None}, "v of store of 'weight' must be a word"),
        ({"strategy": [{"at": "", "map": {}, "store": {"weight": {"map": "cpu:9"}}}], "plan": None}, "no device 'cpu:9' in the cluster"),
        ({"strategy": [{"at": "", "map": {}}], "plan": None, "prefetch": 0}, "prefetch must be at least 1, got 0"),
        ({"strategy": [{"at": "", "map": {}}], "plan": None, "grad_dtype": "half"}, "unknown grad_dtype 'half'"),
        ({"overheads": {"context": "some"}, "plan": {}}, "context of overheads must be a number, got 'some'"),
        ({"overheads": {"context": -5}, "plan": {}}, "none can be negative"),
        ({"behaviour": {"gamma": {"gradient": 3}}, "plan": {}}, "gamma of behaviour must be a mapping to a list of 2, each a number"),
        ({"calibration": {"matmul": float("nan")}, "plan": {}}, "matmul of a calibration must be a number, got nan"),
        ({"behaviour": {"overlap": "always"}, "plan": {}}, "unknown overlap rule 'always'"),
        ({"batch": 0, "plan": {}}, "batch must be a whole number"),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_one_sentence(change, sentence):
    data = {k: v for k, v in (BASE | change).items() if v is not None}
    with pytest.raises(ApportionError, match=sentence) as caught:
        read_question(data).answer(0)
    assert "\n" not in str(caught.value)


@pytest.fixture
def files(tmp_path):
    import yaml

    def write(name, data):
        (tmp_path / name).write_text(yaml.safe_dump(data))
        return str(tmp_path / name)

    return write


ON_TWO_RANKS = [{"at": "", "map": {"pp": 0}}, *({"at": p, "map": {"pp": 1}} for p in ("layers.1", "final_norm", "head", "loss"))]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"plan": {"tp": 16}}, "the plan needs 16 devices, the cluster has 8"),
        ({"mesh": {"tp": 8}, "strategy": [{"at": "", "map": {}}, {"at": "head", "split": {"q": "tp"}}]}, "'head' has no dim 'q'; it has"),
        ({"model": "no_such_config.json", "plan": {}}, "no_such_config.json"),
        ({"model": "alien.json", "plan": {}}, "unknown architecture 'AlienForCausalLM'"),
        ({"mesh": {"pp": 2}, "strategy": ON_TWO_RANKS, "schedule": {"num_micro_batches": 4, "max_ongoing": [1, 2]}},
         "the schedule deadlocks: rank 0 waits at backward of stage 0, micro-batch 0, for"),
        ({"cluster": {"node": "dgx-a100", "fabric": {"a": {"nodes": [0], "parent": "a", "gb_s": 1}}}, "plan": {}},
         "the fabric is cyclic: a -> a"),
        ({"cluster": {"node": "dgx-a100", "num_nodes": 2, "fabric": {"a": {"nodes": [0]}, "b": {"nodes": [1]}}}, "plan": {"dp": 16}},
         "the cluster is not connected: no link leads from 'gpu:"),
        ({"dtype": "float8_e4m3fn", "plan": {}},
         "the cost of 'layers.0.attn.qkv' is not supported: a100-sxm-80 has no numbers for gemm in float8"),
    ],
    ids=str,
)  # fmt: skip
def test_the_command_line_says_in_one_sentence_what_cannot_be(change, sentence, files, tmp_path, capsys):
    (tmp_path / "alien.json").write_text('{"architectures": ["AlienForCausalLM"], "model_type": "alien"}')
    assert main(["simulate", "run", files("bad.yaml", BASE | change)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("apportion: ") and said.err.count("\n") == 1 and sentence in said.err


def test_files_that_cannot_be_read_or_written_are_named(files, tmp_path, capsys):
    path = files("two.yaml", BASE | {"plan": {}})
    for arguments in (
        ["run", str(tmp_path)],
        ["run", path, "--trace", str(tmp_path / "no" / "t.json")],
        ["run", path, "--num-draws", "-1"],
    ):
        assert main(["simulate", *arguments]) == 2
    read, written, draws = capsys.readouterr().err.splitlines()
    assert "cannot be read" in read and "t.json' cannot be written" in written and "num_draws must be at least 0" in draws


def test_weights_in_host_memory_are_fetched_from_there():
    data = BASE | {"mesh": {"dp": 2}, "strategy": [{"at": "", "map": {}, "split": {"b": "dp"}, "store": {"weight": {"map": "cpu:0"}}}]}
    assert {"h2d", "d2h"} <= {task.stream for task in read_question(data).answer(0).graph.tasks}


def test_run_prints_json_a_trace_and_a_picture(files, tmp_path, capsys):
    path = files("two.yaml", BASE | {"plan": {"pp": 2, "tp": 2, "num_micro_batches": 2}, "detail": "operators"})
    assert main(["simulate", "run", path, "--json", "--trace", str(tmp_path / "t.json"), "--memory-png", str(tmp_path / "m.png")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["name"] == "two" and answer["fits"] and answer["band"][0] <= answer["seconds"] <= answer["band"][1]
    assert sum(answer["sources"].values()) == pytest.approx(1.0) and any(s.startswith(("exact", "inter")) for s in answer["sources"])
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert all(e["pid"] > 0 and e.get("tid", 1) > 0 for e in events), "Perfetto keeps 0 for itself"
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(answer["seconds"] * 1e6)
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {f"gpu:{i}" for i in range(4)}
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_flags_are_a_file(files, capsys):
    question = ["--model", "gpt2", "--cluster", "dgx-a100", "--batch", "8", "--seq-len", "512", "--tp", "2", "--dp", "2"]
    main(["simulate", "run", *question, "--json", "--num-draws", "0"])
    by_flags = json.loads(capsys.readouterr().out)
    path = files("run.yaml", {"model": "gpt2", "batch": 8, "seq_len": 512, "cluster": "dgx-a100", "plan": {"tp": 2, "dp": 2}})
    main(["simulate", "run", path, "--json", "--num-draws", "0"])
    assert json.loads(capsys.readouterr().out)["seconds"] == by_flags["seconds"]
    assert main(["simulate", "run", path, "--tp", "2"]) == 2
    assert main(["simulate", "run", "--model", "gpt2"]) == 2
    assert "no --cluster" in capsys.readouterr().err


def test_rank_orders_and_says_what_is_within_the_band(files, capsys):
    paths = [files(f"{n}.yaml", BASE | {"plan": p}) for n, p in (("slow", {}), ("fast", {"dp": 4}), ("same", {"dp": 4, "bucket_mb": 24.9}))]
    assert main(["simulate", "rank", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "slow" in lines[-1] and "within the band" in lines[0] and "within the band" not in lines[1]
    assert main(["simulate", "rank", *paths, "--num-draws", "1"]) == 2


def test_calibrate_fits_predicts_and_is_used(files, tmp_path, capsys):
    rows = [{"plan": {"tp": t, "num_micro_batches": 1}, "seconds": s} for t, s in ((1, 0.200), (2, 0.130), (4, 0.095))]
    ahead = [{"name": "dp", "plan": {"dp": 2, "tp": 2}}]
    path = files("rows.yaml", BASE | {"rows": rows, "predict": ahead})
    assert main(["simulate", "calibrate", path, "--json", "--out", str(tmp_path / "fit.json")]) == 0
    fit = json.loads(capsys.readouterr().out)
    assert set(fit["left_out"]) == {"pp1 tp1 dp1", "pp1 tp2 dp1", "pp1 tp4 dp1"} and fit["predicted"][0]["seconds"] > 0
    plan = files("plan.yaml", BASE | {"plan": {"tp": 2}, "calibration": "fit.json", "detail": "stages"})
    main(["simulate", "run", plan, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["seconds"] == pytest.approx(0.130, rel=0.1) and "calibrated" in str(answer["sources"])
    main(["simulate", "calibrate", path, "--choose", "2"])
    assert len(capsys.readouterr().out.split("\n")) == 3
    bad = files("bad.yaml", BASE | {"rows": [{"plan": {"tp": 2}}]})
    assert main(["simulate", "calibrate", bad, "--choose", "1"]) == 0 and capsys.readouterr().out == "pp1 tp2 dp1\n"
    assert main(["simulate", "calibrate", bad]) == 2
    assert "entry 1 of 'rows' needs the field 'seconds'" in capsys.readouterr().err
    assert main(["simulate", "calibrate", str(tmp_path / "absent.yaml")]) == 2
