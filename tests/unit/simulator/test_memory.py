"""Reference counting against hand-made graphs and closed forms."""

import pytest

from apportion.core.errors import InvalidParameter
from apportion.simulator import presets
from apportion.simulator.cluster import Cluster
from apportion.simulator.compiler import compile
from apportion.simulator.execution_graph import Buffer, ExecutionGraph, Piece, Task, View
from apportion.simulator.htae import Cost, execute
from apportion.simulator.memory import COMMUNICATOR_BYTES, Overheads, memory_of
from apportion.simulator.strategy_tree import StrategyTree
from tests.papers.proteus import gpt


def chain(in_place: bool = False) -> ExecutionGraph:
    """w (10) stays; t0 writes a (4), t1 makes b (6, or 4 in a's place) of it, t2 reads b."""
    size = 4 if in_place else 6
    buffers = [
        Buffer(0, "w", "gpu:0", ((0, 10),), 1, "weight"),
        Buffer(1, "a", "gpu:0", ((0, 4),), 1, "activation"),
        Buffer(2, "b", "gpu:0", ((0, size),), 1, "activation", None, 1 if in_place else None),
    ]
    a, b = View(1, buffers[1].box), View(2, buffers[2].box)
    pieces = [Piece((View(0, buffers[0].box),), (a,)), Piece((a,), (b,)), Piece((b,), ())]
    tasks = [Task(i, "compute", f"t{i}", ("gpu:0",), "compute", "forward", 0, None, (piece,)) for i, piece in enumerate(pieces)]
    return ExecutionGraph("chain", buffers=buffers, tasks=tasks)


def peaks(graph, overheads=None, seconds=1.0):
    timeline = execute(graph, [Cost(seconds)] * len(graph.tasks))
    return memory_of(graph, timeline, overheads or Overheads.none())


def test_a_buffer_lives_from_its_writers_start_to_its_last_readers_end():
    found = peaks(chain())["gpu:0"]
    assert found.curve == ((0.0, 14.0), (1.0, 20.0), (2.0, 16.0), (3.0, 10.0))
    assert (found.peak, found.peak_at_s) == (20.0, 1.0)
    assert found.categories["weight"] == 10 and found.categories["activation"] == 10


def test_memory_taken_over_counts_once():
    assert peaks(chain(in_place=True))["gpu:0"].curve == ((0.0, 14.0), (3.0, 10.0))


def test_what_no_strategy_sees_is_counted():
    overheads = Overheads(context=100, workspace=10, communicators={2: 7}, granularity=8, fragmentation=0.5)
    found = peaks(chain(), overheads)["gpu:0"]
    assert found.categories["weight"] == 16 and found.categories["activation"] == 16
    assert found.categories["fragmentation"] == 8 and found.categories["communicators"] == 0, "it never communicates"
    assert found.peak == 16 + 16 + 8 + 110


def test_the_verdict_has_a_margin():
    found = peaks(chain())["gpu:0"]
    assert [found.verdict(c) for c in (22, 20, 18)] == ["fits", "uncertain", "out of memory"]
    with pytest.raises(InvalidParameter, match="must be positive"):
        found.verdict(0)


def parallel(zero=0, recompute=False, pp=1, m=1, order="1f1b", dp=2, layers=4, batch=16):
    model = gpt(batch, layers=layers, dtype="bfloat16")
    tree = StrategyTree(model)
    tree.at("").split(b="dp")
    presets.pipeline(tree, Cluster.of(1, 8).mesh(pp=pp, dp=dp), layers)
    if zero:
        presets.zero(tree, zero)
    if recompute:
        tree.at("layers.*").recompute()
    tree.schedule(m, order)
    return compile(model, tree)


def test_strategies_order_as_they_must():
    plain, recomputed = (peaks(parallel(recompute=r))["gpu:0"] for r in (False, True))
    assert recomputed.categories["activation"] < plain.categories["activation"]
    stages = [peaks(parallel(pp=2, m=4, order=order, dp=1)) for order in ("gpipe", "1f1b")]
    assert stages[1]["gpu:0"].peak < stages[0]["gpu:0"].peak
    sharded = [peaks(parallel(zero=z))["gpu:0"].categories for z in range(4)]
    assert sharded[1]["state"] == pytest.approx(sharded[0]["state"] / 2, rel=0.1)
    assert sharded[3]["weight"] == pytest.approx(sharded[0]["weight"] / 2, rel=0.1)


def test_the_largest_communicator_counts():
    graph = parallel(dp=4)
    assert peaks(graph, Overheads())["gpu:0"].categories["communicators"] == COMMUNICATOR_BYTES[4]
