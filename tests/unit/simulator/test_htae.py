"""The executor against cases small enough to work out by hand, and against what must hold for every graph."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.core.errors import InvalidParameter
from apportion.simulator import presets
from apportion.simulator.cluster import Cluster
from apportion.simulator.compiler import compile
from apportion.simulator.execution_graph import ExecutionGraph, Task
from apportion.simulator.fair_share import fair_share
from apportion.simulator.htae import Behaviour, Cost, execute
from apportion.simulator.schedule import Action, actions_of, merge
from apportion.simulator.strategy_tree import Schedule, StrategyTree
from tests.papers.proteus import gpt

GB = 1e9


def task(id, devices=("gpu:0",), stream="compute", after=(), name=None):
    kind = "compute" if stream == "compute" else "all_reduce"
    return Task(id, kind, name or f"t{id}", tuple(devices), stream, "forward", 0, None, (), tuple(after))


def graph(*tasks):
    return ExecutionGraph("by hand", tasks=list(tasks))


def test_two_flows_share_a_link():
    """10 GB/s; 1 GB at 0 and 1 GB at 50 ms: the first ends at 150 ms, the second at 200 ms. Together at 0: both at 200 ms."""
    g = graph(task(0, stream="compute"), task(1, stream="a"), task(2, stream="b", after=(0,)))
    flow = Cost(0.0, 1 * GB, 10 * GB, {0: 1.0})
    shared = execute(g, [Cost(0.05), flow, flow], [10 * GB])
    assert shared.end[1:] == pytest.approx([0.150, 0.200])
    at_once = graph(task(0, stream="a"), task(1, stream="b"))
    assert execute(at_once, [flow, flow], [10 * GB]).end == pytest.approx([0.2, 0.2])
    other_way = Cost(0.0, 1 * GB, 10 * GB, {1: 1.0})
    assert execute(at_once, [flow, other_way], [10 * GB] * 2).end == pytest.approx([0.1, 0.1])
    assert execute(at_once, [flow, flow], [10 * GB], Behaviour(share=False)).end == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("rule, communication, compute", [("fluid", 0.052, 0.112), ("whole_op", 0.052, 0.130), ("none", 0.040, 0.100)])
def test_compute_and_communication_slow_each_other_down(rule, communication, compute):
    """100 ms of computing over 40 ms of gradients, gamma 0.3."""
    g = graph(task(0), task(1, stream="gradient"))
    ended = execute(g, [Cost(0.1), Cost(0.04)], behaviour=Behaviour(overlap=rule)).end
    assert ended == pytest.approx([compute, communication])
    transfer = execute(g, [Cost(0.1), Cost(0.0, 40.0, 1000.0)], behaviour=Behaviour(overlap=rule)).end
    assert transfer == pytest.approx([compute, communication])


def test_an_overlap_of_one_percent_costs_one_percent_unless_the_papers_rule_is_chosen():
    g = graph(task(0), task(1, stream="x"), task(2, stream="gradient", after=(1,)))
    costs = [Cost(0.1), Cost(0.099), Cost(0.0299)]
    assert execute(g, costs, behaviour=Behaviour(overlap="fluid")).end[0] == pytest.approx(0.1003)
    assert execute(g, costs, behaviour=Behaviour(overlap="whole_op")).end[0] == pytest.approx(0.130)


def pipeline_graph(p, m, order, max_ongoing=None):
    schedule = Schedule(m, order, max_ongoing)
    lists = [actions_of(rank, [rank], p, schedule) for rank in range(p)]

    def needs(a):
        if a.phase == "forward":
            return [Action("forward", a.stage - 1, a.micro_batch)] if a.stage else []
        return [Action("forward", a.stage, a.micro_batch)] + ([Action("backward", a.stage + 1, a.micro_batch)] if a.stage < p - 1 else [])

    found = {action: i for i, action in enumerate(merge(lists, needs))}
    tasks = [task(i, (f"gpu:{a.stage}",), after=[found[n] for n in needs(a)], name=a.phase) for a, i in found.items()]
    return ExecutionGraph("pipeline", tasks=tasks), [Cost(0.01 if a.phase == "forward" else 0.02) for a in found]


@pytest.mark.parametrize("p, m", [(2, 4), (4, 4), (4, 8), (3, 7)])
@pytest.mark.parametrize("order", ["gpipe", "1f1b"])
def test_the_bubble_of_a_pipeline(p, m, order):
    """(m + p - 1) of forward and backward: with p 2, m 4, 10 and 20 ms that is 150 ms, a fifth of it bubble."""
    assert execute(*pipeline_graph(p, m, order)).seconds == pytest.approx((m + p - 1) * 0.03)


def test_max_ongoing_reproduces_1f1b():
    a, b = (execute(*pipeline_graph(2, 4, "1f1b", limit)) for limit in (None, (2, 1)))
    assert a.start == pytest.approx(b.start)


def test_a_collective_waits_for_all_its_members():
    g = graph(task(0, ("gpu:0",)), task(1, ("gpu:0", "gpu:1"), "feature", after=(0,)), task(2, ("gpu:1", "gpu:2"), "feature"))
    timeline = execute(g, [Cost(0.03), Cost(0.01), Cost(0.01)])
    assert timeline.start == pytest.approx([0, 0.03, 0.04]), "the second collective stands behind the first on gpu:1"


def test_a_deadlock_names_both_devices():
    """Two groups issue two collectives in opposite order: each heads one queue and waits for the other's."""
    g = graph(task(0, ("gpu:0", "gpu:1"), "feature", name="first"), task(1, ("gpu:0", "gpu:1"), "feature", name="second"))
    g.tasks[0] = task(0, ("gpu:0", "gpu:1"), "feature", after=(1,), name="first")
    with pytest.raises(InvalidParameter, match="deadlock"):
        execute(g, [Cost(0.1), Cost(0.1)])
    crossed = graph(
        task(0, ("gpu:0",), "feature", after=(2,), name="a"),
        task(1, ("gpu:1", "gpu:0"), "feature", name="b"),
        task(2, ("gpu:1",), "feature", after=(), name="c"),
    )
    with pytest.raises(InvalidParameter, match=r"gpu:1 waits in all_reduce 'b' for gpu:0, which is at all_reduce 'a'"):
        execute(crossed, [Cost(0.1)] * 3)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InvalidParameter, match="unknown overlap rule 'fluidd'"):
        Behaviour(overlap="fluidd")
    with pytest.raises(InvalidParameter, match="cannot be negative"):
        Behaviour(gamma={"gradient": (-1.0, 0.0)})
    with pytest.raises(InvalidParameter, match="1 costs for 2 tasks"):
        execute(graph(task(0), task(1)), [Cost(1.0)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fair_shares_are_max_min(data):
    """No link is overfull, and each flow is bound by its limit or by a full link on which nobody has more."""
    capacity = data.draw(st.lists(st.floats(1, 100), min_size=1, max_size=5))
    links = st.dictionaries(st.integers(0, len(capacity) - 1), st.sampled_from([0.5, 1.0, 2.0]), max_size=3)
    flows = data.draw(st.lists(st.tuples(st.floats(0.5, 200), links), min_size=1, max_size=6))
    rates = fair_share(flows, capacity)
    load = [sum(r * links.get(link, 0) for r, (_, links) in zip(rates, flows, strict=True)) for link in range(len(capacity))]
    assert all(used <= room * (1 + 1e-9) for used, room in zip(load, capacity, strict=True))
    for rate, (limit, links) in zip(rates, flows, strict=True):
        tight = [link for link in links if load[link] >= capacity[link] * (1 - 1e-9)]
        largest = [max(r for r, (_, other) in zip(rates, flows, strict=True) if link in other) for link in tight]
        assert rate >= limit * (1 - 1e-9) or any(rate >= top * (1 - 1e-9) for top in largest)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(1, 2, 2), (2, 2, 1), (2, 1, 2)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["gpipe", "1f1b"]),
    st.sampled_from(["fluid", "whole_op", "none"]),
    st.integers(0, 5),
)
def test_what_holds_for_every_graph(shape, m, order, rule, seed):
    """Edges and queues are kept; no faster than the longest path or the busiest device; slower costs never end sooner."""
    pp, dp, tp = shape
    model = gpt(batch=8)
    tree = StrategyTree(model)
    tree.at("").split(b="dp")
    presets.pipeline(tree, Cluster.of(1, 4).mesh(pp=pp, dp=dp, tp=tp), 2)
    presets.tensor_parallel(tree)
    tree.schedule(m, order)
    g = compile(model, tree)
    draw = random.Random(seed)
    costs = [Cost(draw.uniform(0.1, 1)) if t.kind == "compute" else Cost(0.05, draw.uniform(0.1, 1), 1.0, {0: 0.5}) for t in g.tasks]
    behaviour = Behaviour(overlap=rule)
    timeline = execute(g, costs, [1.0], behaviour)
    longest = [0.0] * len(g.tasks)
    busy = dict.fromkeys(g.devices, 0.0)
    for t in g.tasks:
        assert all(timeline.end[p] <= timeline.start[t.id] + 1e-9 for p in g.predecessors[t.id])
        assert timeline.end[t.id] - timeline.start[t.id] >= costs[t.id].total * (1 - 1e-9)
        longest[t.id] = max([longest[p] for p in g.predecessors[t.id]], default=0.0) + costs[t.id].total
        if t.kind == "compute":
            busy[t.devices[0]] += costs[t.id].total
    assert timeline.seconds >= max(max(longest), *busy.values()) * (1 - 1e-9)
    assert execute(g, costs, [1.0], behaviour) == timeline, "the same answer every time"
    slower = [Cost(c.seconds * 2, c.wire_bytes * 2, c.rate, c.links) for c in costs]
    assert execute(g, slower, [1.0], behaviour).seconds == pytest.approx(2 * timeline.seconds)
