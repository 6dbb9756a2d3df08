"""The proof of test_proteus_compiler, put to the proof: a graph that was broken on purpose must not pass it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from apportion.core.errors import InternalError, InvalidParameter
from apportion.simulator import presets
from apportion.simulator.cluster import Cluster
from apportion.simulator.compiler import compile
from apportion.simulator.execution_graph import ExecutionGraph, Piece, Task
from apportion.simulator.interpreter import dense, run
from apportion.simulator.strategy_tree import StrategyTree
from tests.papers.proteus import arrays_of, gpt, moe

CLUSTER = Cluster.of(2, 4)


def sharded(model, zero):
    """Tensor parallel with sequence parallelism, data parallel with ZeRO: reductions, scatters and gathers."""
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=2, tp=2))
    presets.tensor_parallel(tree, sequence_parallel=zero > 1)
    presets.zero(tree, zero)
    return model, tree


def staged(model):
    tree = StrategyTree(model)
    presets.pipeline(tree, CLUSTER.mesh(pp=2), 2)
    tree.schedule(2)
    return model, tree


def experts(model):
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=2))
    presets.expert_parallel(tree)
    return model, tree


def a_member_left_out(task: Task) -> Task:
    first, *rest = task.pieces
    return replace(task, pieces=(Piece(first.reads[:-1], first.writes), *rest))


def a_tensor_forgotten(task: Task) -> Task:
    return replace(task, pieces=task.pieces[1:])


def copied_instead_of_summed(task: Task) -> Task:
    return replace(task, kind="broadcast")


def caught(graph: ExecutionGraph, arrays, expected, seed=0) -> bool:
    try:
        got = run(graph, arrays, seed)
    except (InternalError, InvalidParameter, KeyError):
        return True
    return not all(np.allclose(got[name], value, rtol=1e-7, atol=1e-10) for name, value in expected.items())


@pytest.mark.parametrize(
    "kind, plan, breaks",
    [
        ("all_reduce", lambda: sharded(gpt(batch=8), 1), [a_member_left_out, a_tensor_forgotten, copied_instead_of_summed]),
        ("reduce_scatter", lambda: sharded(gpt(batch=8), 2), [a_member_left_out, a_tensor_forgotten, copied_instead_of_summed]),
        ("all_gather", lambda: sharded(gpt(batch=8), 3), [a_member_left_out, a_tensor_forgotten]),
        ("p2p", lambda: staged(gpt(batch=8)), [a_tensor_forgotten]),
        ("all_to_all", lambda: experts(moe(batch=4)), [a_tensor_forgotten]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_collective_is_caught(kind, plan, breaks):
    """Every collective of the kind, broken in every way that applies."""
    model, tree = plan()
    graph, arrays = compile(model, tree, CLUSTER), arrays_of(model)
    expected = dense(model, arrays)
    assert not caught(graph, arrays, expected)
    victims = [task for task in graph.tasks if task.kind == kind]
    assert victims
    for task in victims:
        for broken in breaks:
            tasks = [broken(t) if t is task else t for t in graph.tasks]
            assert caught(replace(graph, tasks=tasks), arrays, expected), f"{broken.__name__}: {task.name} ({task.phase})"


def test_missing_control_edges_are_caught():
    """Without them memory is taken over while somebody still reads it: in some of the orders that are then allowed."""
    model, tree = staged(gpt(batch=8))
    graph, arrays = compile(model, tree, CLUSTER), arrays_of(model)
    expected = dense(model, arrays)
    loose = replace(graph, tasks=[replace(t, after=()) for t in graph.tasks])
    assert not any(caught(graph, arrays, expected, seed) for seed in range(5))
    assert any(caught(loose, arrays, expected, seed) for seed in range(5))
