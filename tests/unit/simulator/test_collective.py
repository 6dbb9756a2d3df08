"""Costs of communications against hand calculation, and the shapes of topologies."""

import pytest

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.simulator.cost.collective import Nccl
from apportion.simulator.topology import device, device_names, node_names, topology

RING = Nccl(choices=(("ring", "simple"),))
MB, US = 1e6, 1e-6
LOOP = {"a": {"nodes": [0], "parent": "b"}, "b": {"nodes": [1], "parent": "a"}}


def all_of(t):
    return [d for node in t.cluster.nodes for d in node]


def test_ring_all_reduce_in_a_node():
    """8 A100, bus 235 GB/s: algorithm bandwidth 235 * 8/14, latency 8.4 + 14 * 3.4 us; 100 MB take 0.801 ms."""
    t = topology("dgx-a100")
    cost = RING.cost(t, "all_reduce", all_of(t), 100 * MB)
    assert cost.seconds == pytest.approx(56.0 * US)
    assert 100 * MB / (cost.total - cost.seconds) == pytest.approx(134.3e9, rel=1e-3)
    assert cost.total == pytest.approx(0.801e-3, rel=1e-3)


def test_ring_all_reduce_between_nodes():
    """16 V100 in two nodes, one 12 GB/s path: 6.4 GB/s, 122.8 us, x 1.9 at the plateau; 25 MB take 4.14 ms."""
    t = topology("dgx-1-v100", 2)
    cost = RING.cost(t, "all_reduce", all_of(t), 25 * MB)
    assert cost.seconds == pytest.approx(233.3 * US, rel=1e-3)
    assert cost.total == pytest.approx(4.14e-3, rel=1e-3)
    assert RING.cost(t, "all_reduce", all_of(t), 1000).seconds == pytest.approx(122.8 * US), "below the plateau"


def test_gathers_and_scatters_of_a_ring():
    """268.6 GB/s and 32.2 us; an all-reduce is at least a reduce-scatter and an all-gather less one base latency."""
    t = topology("dgx-a100")
    gather, scatter, reduce = (
        RING.cost(t, kind, all_of(t), 100 * MB) for kind in ("all_gather", "reduce_scatter", "all_reduce")
    )  # fmt: skip
    assert gather.seconds == pytest.approx(32.2 * US)
    assert 100 * MB / (gather.total - gather.seconds) == pytest.approx(268.6e9, rel=1e-3)
    assert reduce.total >= gather.total + scatter.total - 8.4 * US - 1e-12


def test_small_messages_take_the_low_latency_protocol():
    t = topology("dgx-h100")
    sizes = [256, 1e6, 1e9]
    chosen = [Nccl().cost(t, "all_reduce", all_of(t), size) for size in sizes]
    assert [c.source.split()[-1] for c in chosen] == ["ll", "ll", "simple"]
    assert all(c.total <= RING.cost(t, "all_reduce", all_of(t), s).total for c, s in zip(chosen, sizes, strict=True))
    two = topology("dgx-a100", 8)
    assert "tree" in Nccl().cost(two, "all_reduce", all_of(two), 1e6).source, "many nodes: the tree has fewer hops"


def test_a_ring_leaves_through_the_nics_its_members_are_next_to():
    t = topology("dgx-a100", 2)
    whole = RING.cost(t, "all_reduce", all_of(t), 1e9)
    pair = RING.cost(t, "all_reduce", ["gpu:0", "gpu:8"], 1e9)
    assert whole.rate == pytest.approx(8 * 24e9) and pair.rate == pytest.approx(24e9)


def test_devices_without_a_switch_use_every_link():
    """DGX-1: six NVLinks of 22 GB/s each; a pair with one link has only that."""
    t = topology("dgx-1-v100")
    assert RING.cost(t, "all_reduce", all_of(t), 1e9).rate == pytest.approx(132e9)
    assert RING.cost(t, "all_reduce", ["gpu:0", "gpu:1"], 1e9).rate == pytest.approx(22e9)
    assert RING.cost(t, "all_reduce", ["gpu:0", "gpu:3"], 1e9).rate == pytest.approx(44e9)
    assert RING.cost(t, "all_reduce", ["gpu:0", "gpu:5"], 1e9).rate == pytest.approx(22e9), "no link: through a neighbour"


def test_all_to_all_and_messages_load_their_routes():
    t = topology("dgx-a100", 2)
    p2p = Nccl().cost(t, "p2p", ["gpu:0", "gpu:9"], 24e9)
    assert p2p.rate == pytest.approx(24e9) and p2p.total == pytest.approx(1.0, rel=1e-3)
    inside = Nccl().cost(t, "all_to_all", [f"gpu:{i}" for i in range(8)], 235e9)
    assert inside.total == pytest.approx(1.0, rel=1e-3)
    host = Nccl().cost(t, "p2p", ["cpu:0", "gpu:3"], 24e9)
    assert host.total == pytest.approx(1.0, rel=1e-3)


def test_one_member_costs_nothing_and_an_unknown_kind_is_refused():
    t = topology("dgx-a100")
    assert RING.cost(t, "all_reduce", ["gpu:3"], 1e9).total == 0
    with pytest.raises(Unsupported, match="'reduce_all' is not known"):
        RING.cost(t, "reduce_all", all_of(t), 1)


def test_the_library_is_whole():
    """Every node can be built and is connected; tensor-core peaks are the dense ones, which are never more than 2x the next dtype."""
    for name in node_names():
        t = topology(name, 2)
        devices = all_of(t)
        assert t.path(devices[0], devices[-1]) and t.path("cpu:0" if "cpu:0" not in devices else "host:0", devices[0])
    for name in device_names():
        peaks = device(name).flops
        if "float8_e4m3fn" in peaks:
            assert peaks["float8_e4m3fn"] <= 2.03 * peaks["bfloat16"]
    assert device("h200-sxm").flops["bfloat16"] == 989e12 and device("b200").flops["float8_e4m3fn"] == 4500e12


@pytest.mark.parametrize(
    "match, build",
    [
        ("unknown node 'dgx-a101'", lambda: topology("dgx-a101")),
        ("unknown device 'h300'", lambda: topology("dgx-a100", device="h300")),
        ("no field 'nick'", lambda: topology("dgx-a100", nick=1)),
        ("needs the field 'nics'", lambda: topology({"device": "h100-sxm", "num_devices": 2, "pcie": {}})),
        ("a cluster of 0 nodes", lambda: topology("dgx-a100", 0)),
        ("the fabric is cyclic: a -> b -> a", lambda: topology("dgx-a100", 2, LOOP)),
        ("hangs on 'spine', which", lambda: topology("dgx-a100", 1, {"leaf": {"nodes": [0], "parent": "spine", "gb_s": 1}})),
        ("hold nodes .0.; the cluster has nodes 0 to 1", lambda: topology("dgx-a100", 2, {"leaf": {"nodes": [0]}})),
    ],
)  # fmt: skip
def test_a_cluster_that_cannot_be_is_refused(match, build):
    with pytest.raises(InvalidParameter, match=match):
        build()


def test_nodes_that_are_not_connected_are_named():
    t = topology("dgx-a100", 2, {"left": {"nodes": [0]}, "right": {"nodes": [1]}})
    with pytest.raises(InvalidParameter, match="no link leads from 'gpu:0' to 'gpu:8'"):
        t.path("gpu:0", "gpu:8")


def test_flows_over_one_nic_share_it():
    """Two pairs of one node pair, one NIC: each has half. In opposite directions: each has all of it."""
    from apportion.simulator.execution_graph import ExecutionGraph, Task
    from apportion.simulator.htae import execute

    t = topology("dgx-1-v100", 2)

    def seconds(*pairs):
        tasks = [Task(i, "p2p", "m", pair, "feature", "forward", 0, None, ()) for i, pair in enumerate(pairs)]
        return execute(ExecutionGraph("n", tasks=tasks), [Nccl().cost(t, "p2p", p, 12e9) for p in pairs], t.capacity).seconds

    assert seconds(("gpu:0", "gpu:8")) == pytest.approx(1.0, rel=1e-3)
    assert seconds(("gpu:0", "gpu:8"), ("gpu:1", "gpu:9")) == pytest.approx(2.0, rel=1e-3)
    assert seconds(("gpu:0", "gpu:8"), ("gpu:9", "gpu:1")) == pytest.approx(1.0, rel=1e-3)
