"""The recipe that runs graphs for real: torch computes what numpy does, on one rank."""

import numpy as np
import pytest

from apportion.simulator.compiler import compile
from apportion.simulator.interpreter import dense
from apportion.simulator.models.cnn import vgg19
from apportion.simulator.strategy_tree import StrategyTree
from recipes.simulator.cases import CALIBRATION_MODELS, CLUSTER, all_cases, graph_of
from recipes.simulator.predict import issued, signatures
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


def test_a_host_issues_in_order():
    graph = issued(graph_of("mlp-3x768", "zero3"))
    graph.check()
    for task in graph.tasks:
        if task.kind != "compute":
            before = [t.id for t in graph.tasks[: task.id] if t.kind == "compute" and set(t.devices) & set(task.devices)]
            assert not before or before[-1] in graph.predecessors[task.id]
    assert len(signatures([("mlp-3x768", "single")])) < 30
