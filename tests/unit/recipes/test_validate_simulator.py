"""The recipe that runs graphs for real: torch computes what numpy does, on one rank."""

import numpy as np
import pytest

from apportion.simulator.compiler import compile
from apportion.simulator.interpreter import dense
from apportion.simulator.models.cnn import vgg19
from apportion.simulator.strategy_tree import StrategyTree
from recipes.simulator.cases import CALIBRATION_MODELS, CLUSTER, all_cases, graph_of
from recipes.simulator.host import walked
from recipes.simulator.predict import read, signatures
from recipes.simulator.two_ranks import Rank
from tests.papers.proteus import arrays_of, gpt


@pytest.mark.parametrize("model", [gpt(), vgg19(2, 32, 5, width=0.05)], ids=lambda m: m.name)
def test_a_rank_computes_what_the_model_does(model):
    """Every operator, forward, backward and update, in float32 against float64."""
    tree = StrategyTree(model)
    tree.at("").map(CLUSTER.mesh(dp=1))
    graph, arrays = compile(model, tree, CLUSTER), arrays_of(model)
    expected = dense(model, arrays)
    rank = Rank(graph, CLUSTER.nodes[0][0], 0, arrays=arrays)
    rank.watch = True
    rank.step()
    assert rank.peak > 0
    for name, parts in graph.results.items():
        (view, _), *_ = parts
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(rank.read(view).double().numpy(), expected[name], rtol=1e-2, atol=1e-3 * scale + 1e-7, err_msg=name)


def test_cases_are_held_out():
    cases = all_cases()
    assert len(cases) >= 60 and not {c.model for c in cases} & set(CALIBRATION_MODELS)
    assert len({c.name for c in cases}) == len(cases) and {c.link for c in cases} == {"loopback", "1gbit", "200mbit"}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_host_packs_and_unpacks(overlap):
    """Around every message, on each of its devices: packed by then, unpacked before the first task that needs it, or at once."""
    plain, graph = graph_of("mlp-3x768", "zero3"), walked(graph_of("mlp-3x768", "zero3"), overlap)
    graph.check()
    messages = [t for t in graph.tasks if t.kind in ("all_gather", "reduce_scatter", "all_reduce")]
    assert len(messages) == sum(t.kind != "compute" and t.stream != "compute" for t in plain.tasks)
    for task in messages:
        before = [graph.tasks[p] for p in graph.predecessors[task.id]]
        assert sorted(d for t in before if t.kind == "pack" for d in t.devices) == sorted(task.devices)
        for device in task.devices:
            after = [t for t in graph.tasks[task.id :] if device in t.devices]
            (unpack,) = (t for t in after if t.kind == "unpack" and task.id in t.after)
            needing = [t for t in after if t.kind == "compute" and task.id in graph.predecessors[t.id]]
            assert all(t.id > unpack.id for t in needing)
            assert overlap or after[1] is unpack or after[2] is unpack  # the other device's stands between
            assert unpack.num_bytes == (sum(v.num_bytes for v in _mine(graph, task, device)) if task.kind == "all_gather" else 0)


def _mine(graph, task, device):
    return [graph.buffers[v.buffer] for v in task.writes if graph.buffers[v.buffer].device == device]


def test_between_two_sizes_and_beyond():
    table = {"p2p 1024": 1.0, "p2p 4096": 4.0, "copy 1024": 9.0}
    assert read(table, "p2p", 2048) == pytest.approx(2.0) and read(table, "p2p", 10) == 1.0
    assert read(table, "p2p", 8192) == pytest.approx(8.0)


def test_operators_are_told_apart_by_shape():
    assert 10 < len(signatures([("mlp-3x768", "single")])) < 30
