"""The parts of a step: every call is noted once, they and the host make the step, the trace holds them."""

import pytest

from apportion.bench.breakdown import measure_breakdown
from apportion.cli.main import main
from apportion.kernels.dispatch import select_ops
from apportion.platforms.platform import select_platform


def test_parts_make_the_step(bundled_model):
    found = measure_breakdown(bundled_model, select_ops(select_platform("cpu")), batch_size=2, context_len=40, num_steps=3)
    assert set(found.ms) == {"attention", "linear", "norm", "sampling", "host"}
    assert sum(found.ms.values()) == pytest.approx(found.step_ms) and all(ms > 0 for ms in found.ms.values())
    step, *calls = found.trace["traceEvents"]
    assert step["dur"] == pytest.approx(found.step_ms * 1e3)
    assert sum(call["dur"] for call in calls if call["cat"] == "linear") == pytest.approx(found.ms["linear"] * 1e3)
    ends = [call["ts"] + call["dur"] for call in calls]
    assert all(call["ts"] >= end for call, end in zip(calls[1:], ends, strict=False)) and ends[-1] <= step["dur"], "one after the other"
    assert sum(call["name"] == "attention.run" for call in calls) > 1


def test_the_command_prints_them_and_writes_a_trace(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    code = main(
        ["bench", "latency", "--batch-size", "1", "--input-len", "16", "--output-len", "4", "--num-iters", "1", "--num-iters-warmup", "0",
         "--device", "cpu", "--breakdown", "--trace", str(trace), "-q"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "breakdown_linear_ms" in out and "breakdown_host_ms" in out
    assert "traceEvents" in trace.read_text()
