"""Layouts: which collective turns one into another, whom it joins and how much it moves. mesh (dp, tp) = (2, 2), tensor Y[b, s, o]."""

import pytest

from apportion.core.errors import InvalidParameter
from apportion.simulator.cluster import Cluster, DeviceMesh
from apportion.simulator.layout import Layout, Shard, split, tiles, transform
from apportion.simulator.models.builder import Builder
from apportion.simulator.propagation import place, resolve
from apportion.simulator.strategy_tree import StrategyTree

CLUSTER = Cluster.of(2, 2)
MESH = CLUSTER.mesh(dp=2, tp=2)
B, S, OUT, H = 4, 6, 8, 10


def written(mesh=MESH, **dims):
    """The layout in which a linear Y[b, s, o] = X[b, s, h] W[o, h] leaves its output when its dims are split so."""
    b = Builder("one", "float32")
    b.op("y", "einsum", "b s h, o h -> b s o", b.input("x", B, S, H), b.weight("y", OUT, H))
    tree = StrategyTree(b.model)
    tree.at("y").map(mesh).split(**dims)
    op = b.model.ops["y"]
    return place(op, resolve(tree)["y"], 0, 1).layout(op.outputs[0], (B, S, OUT))


def moved(source, target, cluster=CLUSTER):
    return [(t.kind, t.devices, t.volume) for _, transfers in transform(source, target, cluster.distance) for t in transfers]


def gpus(*ids):
    return tuple(f"gpu:{i}" for i in ids)


def test_the_same_layout_moves_nothing():
    assert moved(written(b="dp", o="tp"), written(b="dp", o="tp")) == []


def test_a_finer_target_is_cut_locally():
    assert moved(written(b="dp"), written(b="dp", s="tp")) == []


def test_column_parallel_output_is_gathered_over_tp():
    half = B // 2 * S * OUT
    assert moved(written(b="dp", o="tp"), written(b="dp")) == [("all_gather", gpus(0, 1), half), ("all_gather", gpus(2, 3), half)]


def test_row_parallel_output_is_all_reduced_over_tp():
    half = B // 2 * S * OUT
    partial = written(b="dp", h="tp")
    assert partial.num_terms == 2
    assert moved(partial, written(b="dp")) == [("all_reduce", gpus(0, 1), half), ("all_reduce", gpus(2, 3), half)]


def test_or_reduce_scattered_into_sequence_parts():
    half = B // 2 * S * OUT
    scattered = written(b="dp", s="tp")
    assert moved(written(b="dp", h="tp"), scattered) == [("reduce_scatter", gpus(0, 1), half), ("reduce_scatter", gpus(2, 3), half)]


def test_batch_parts_become_column_parts_by_all_to_all():
    mesh = CLUSTER.mesh(all=4)
    ((kind, devices, volume),) = moved(written(mesh, b="all"), written(mesh, o="all"))
    assert (kind, devices) == ("all_to_all", gpus(0, 1, 2, 3))
    assert volume == B * S * OUT // 4 * 3 // 4  # a member's part, but for the quarter that it keeps


def test_replicas_take_part_in_separate_all_to_alls():
    got = moved(written(b="dp"), written(o="dp"))
    assert [(kind, devices) for kind, devices, _ in got] == [("all_to_all", gpus(0, 2)), ("all_to_all", gpus(1, 3))]


def test_another_mesh_of_the_same_layout_is_pairs():
    cluster = Cluster.of(2, 4)
    mesh = cluster.mesh(pp=2, dp=2, tp=2)
    got = moved(written(mesh.select(pp=0), b="dp", o="tp"), written(mesh.select(pp=1), b="dp", o="tp"), cluster)
    assert [(kind, devices) for kind, devices, _ in got] == [("p2p", gpus(i, i + 4)) for i in range(4)]


def test_one_to_many_and_back():
    one, four = DeviceMesh.of(gpus(0), a=1), CLUSTER.mesh(a=4)
    assert [m[:2] for m in moved(written(one), written(four, b="a"))] == [("scatter", gpus(0, 1, 2, 3))]
    assert [m[:2] for m in moved(written(one), written(four))] == [("broadcast", gpus(0, 1, 2, 3))]
    assert [m[:2] for m in moved(written(four, b="a"), written(one))] == [("gather", gpus(0, 1, 2, 3))]


def test_a_replica_is_fetched_from_the_near_node():
    source = Layout((Shard("gpu:0", ((0, 4),)), Shard("gpu:2", ((0, 4),))))
    target = Layout((Shard("gpu:1", ((0, 4),)), Shard("gpu:3", ((0, 4),))))
    assert [(kind, devices) for kind, devices, _ in moved(source, target)] == [("p2p", gpus(0, 1)), ("p2p", gpus(2, 3))]


def test_partial_sums_on_unequally_many_replicas_are_reduced_once_and_handed_on():
    box = ((0, 4),)
    source = Layout((Shard("gpu:0", box, 0), Shard("gpu:1", box, 1), Shard("gpu:2", box, 1)))
    target = Layout(tuple(Shard(d, box) for d in gpus(0, 1, 2)))
    assert [m[0] for m in moved(source, target)] == ["all_reduce", "p2p"]


def test_what_nobody_holds_cannot_be_moved():
    with pytest.raises(InvalidParameter, match=r"gpu:1 needs .* hold 2 of 4 elements"):
        moved(Layout((Shard("gpu:0", ((0, 2),)),)), Layout((Shard("gpu:1", ((0, 4),)),)))


@pytest.mark.parametrize("extent, parts", [(7, 3), (5, 5), (12, 8), (9, 2)])
def test_uneven_parts_tile_and_the_first_are_longer(extent, parts):
    boxes = [(split((3, 3 + extent), parts, i),) for i in range(parts)]
    assert tiles(boxes, ((3, 3 + extent),))
    sizes = [high - low for ((low, high),) in boxes]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(
    "match, make",
    [
        ("does not hold 3 devices", lambda: DeviceMesh.of(gpus(0, 1, 2), a=2)),
        ("holds a device twice", lambda: DeviceMesh.of(gpus(0, 0), a=2)),
        ("needs 8 devices, the cluster has 4", lambda: CLUSTER.mesh(dp=8)),
        ("no axis 'pp'", lambda: MESH.select(pp=0)),
        ("outside axis 'dp' of size 2", lambda: MESH.select(dp=2)),
        ("no device 'gpu:9' in the cluster", lambda: CLUSTER.distance("gpu:0", "gpu:9")),
    ],
)
def test_meshes_that_cannot_be(match, make):
    with pytest.raises(InvalidParameter, match=match):
        make()
