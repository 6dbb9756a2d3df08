"""Proteus (arXiv:2306.02267), sections 4 and 5: every strategy compiles to a graph that computes what the model computes.

Each test executes the compiled graph on numpy shards, in an order drawn among those its edges allow, and compares the loss, every gradient,
every updated weight and every optimizer state with the dense model; then it looks at the collectives, which the paper says are inferred.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apportion.simulator import presets
from apportion.simulator.cluster import Cluster, DeviceMesh
from apportion.simulator.models.cnn import inception, resnet50, vgg19
from apportion.simulator.models.dlrm import dlrm
from apportion.simulator.ops import Dim, Model
from apportion.simulator.strategy_tree import StrategyTree
from tests.papers.proteus import count, gpt, llama, moe, prove, unfused

CLUSTER = Cluster.of(2, 4)


def small_dlrm(batch: int = 8, num_tables: int = 4) -> Model:
    return dlrm(batch, num_tables=num_tables, rows=10, lookups=3, bottom=(6, 8, 4), top=(6, 5, 1))


def cnns(batch: int = 4) -> list[Model]:
    scale = {"image": 32, "classes": 6, "width": 1 / 32}
    return [vgg19(batch, **scale), resnet50(batch, **scale, blocks=(1, 1, 1, 1)), inception(batch, **scale, blocks=2)]


MODELS = [gpt(), unfused(), gpt(tied=True), llama(), moe(), small_dlrm(), *cnns()]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_data_parallelism_reduces_each_gradient_once(model):
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=4))
    tree.schedule(1)
    graph = prove(model, tree)
    assert {task.kind for task in graph.tasks} == {"compute", "all_reduce"}
    reduced = [piece for task in graph.tasks if task.kind == "all_reduce" for piece in task.pieces]
    assert len(reduced) == sum(t.kind == "weight" for t in model.tensors.values())
    assert all(task.stream == "gradient" for task in graph.tasks if task.kind != "compute")


@pytest.mark.parametrize("model", [gpt(), llama(), unfused()], ids=lambda m: m.name)
@pytest.mark.parametrize("tp, dp", [(2, 1), (4, 1), (2, 2)])
def test_megatron_needs_two_all_reduces_per_layer_and_pass(model, tp, dp):
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=dp, tp=tp))
    presets.tensor_parallel(tree)
    graph = prove(model, tree)
    layers = [t for t in graph.tasks if t.stream == "feature" and t.name.removeprefix("grad:").startswith("layers.")]
    forward = [t for t in layers if t.phase == "forward"]
    assert Counter(t.kind for t in forward) == {"all_reduce": 2 * 2 * dp}
    backward = [t for t in graph.tasks if t.stream == "feature" and t.phase == "backward" and t.kind == "all_reduce"]
    assert len(backward) == (2 * 2 + 1) * dp  # and one into the vocabulary-parallel head


@pytest.mark.parametrize("model", [gpt(), llama(), unfused()], ids=lambda m: m.name)
def test_sequence_parallelism_turns_all_reduces_into_scatters_and_gathers(model):
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=2, tp=2))
    presets.tensor_parallel(tree, sequence_parallel=True)
    graph = prove(model, tree)
    assert count(graph, "all_reduce", "forward") == 0
    kinds = Counter(t.kind for t in graph.tasks if t.phase == "forward" and t.name.startswith("layers."))
    assert kinds["reduce_scatter"] == kinds["all_gather"] == 2 * 2 * 2
    gathered_again = [t for t in graph.tasks if t.phase == "backward" and t.kind == "all_gather" and t.name.endswith("_norm")]
    assert gathered_again, "the backward pass gathers a norm's output again"


@pytest.mark.parametrize("order", ["gpipe", "1f1b"])
@pytest.mark.parametrize("pp, micro_batches, layers", [(2, 1, 2), (2, 4, 2), (4, 8, 4)])
def test_pipelines(order, pp, micro_batches, layers):
    model = gpt(batch=8, layers=layers)
    tree = StrategyTree(model)
    mesh = CLUSTER.mesh(pp=pp, dp=2) if pp == 2 else CLUSTER.mesh(pp=pp, dp=1)
    tree.at("").split(b="dp")
    presets.pipeline(tree, mesh, layers)
    tree.schedule(micro_batches, order)
    graph = prove(model, tree)
    dp = mesh.sizes["dp"]
    assert count(graph, "p2p", "forward") == count(graph, "p2p", "backward") == (pp - 1) * micro_batches * dp
    alive = most = 0
    for task in graph.tasks:
        if task.op in ("embed", "embed.grad") and task.devices == ("gpu:0",):
            alive += 1 if task.phase == "forward" else -1
            most = max(most, alive)
    assert most == (micro_batches if order == "gpipe" else min(pp, micro_batches))


def test_interleaved_pipeline_and_all_three_dimensions():
    model = llama(batch=8, layers=4, tied=True)
    tree = StrategyTree(model)
    mesh = CLUSTER.mesh(pp=2, dp=2, tp=2)
    tree.at("").split(b="dp")
    presets.pipeline(tree, mesh, 4, chunks=2)
    presets.tensor_parallel(tree, sequence_parallel=True)
    presets.zero(tree, 1)
    tree.at("layers.*").recompute()
    tree.schedule(4, "interleaved")
    graph = prove(model, tree, CLUSTER)
    assert max(task.stage for task in graph.tasks) == 3
    sums = [t for t in graph.tasks if t.kind == "all_reduce"]
    tied = [t for t in sums if any(graph.buffers[v.buffer].tensor == "grad:embed.weight" for v in t.reads)]
    assert {len(t.devices) for t in tied} == {4}, "both uses of the tied table are summed over pp x dp at once"


@pytest.mark.parametrize("stage, kinds", [(1, {"all_reduce", "all_gather"}), (2, {"reduce_scatter", "all_gather"})])
@pytest.mark.parametrize("model", [gpt(batch=8), vgg19(8, 32, 8, width=1 / 16)], ids=lambda m: m.name)
def test_zero_one_and_two(model, stage, kinds):
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=4))
    presets.zero(tree, stage)
    tree.schedule(2)
    graph = prove(model, tree)
    assert {t.kind for t in graph.tasks} - {"compute"} == kinds


@pytest.mark.parametrize("stage, times", [(1, 1), (2, 4), (3, 4)])
@pytest.mark.parametrize("pp", [1, 2])
def test_gradients_in_shards_are_reduced_after_every_micro_batch_and_whole_ones_once(stage, times, pp):
    model = gpt(batch=16, tied=pp == 2)
    tree = StrategyTree(model)
    tree.at("").split(b="dp")
    presets.pipeline(tree, CLUSTER.mesh(pp=pp, dp=2), 2)
    presets.zero(tree, stage)
    tree.schedule(4)
    graph = prove(model, tree)
    reduced = [piece for t in graph.tasks if t.kind == ("all_reduce" if stage == 1 else "reduce_scatter") for piece in t.pieces]
    names = Counter(graph.buffers[piece.reads[0].buffer].tensor for piece in reduced)
    untied = [f"grad:{t.name}" for t in model.tensors.values() if t.kind == "weight" and len(model.consumers[t.name]) == 1]
    assert {names[name] for name in untied} == {times}
    if stage > 1:
        wholes = {b.id: b.micro_batch for b in graph.buffers if b.kind == "partial" and b.tensor.startswith("grad:")}
        later = [t for t in graph.tasks for view in t.reads if wholes.get(view.buffer, t.micro_batch) != t.micro_batch]
        assert not later, "no whole gradient outlives its micro-batch"


def test_gradient_buckets_hold_one_stage():
    """Two stages on one rank, as two models in frameworks: what the earlier one makes does not wait for, or ride with, the later one's."""
    model = gpt(batch=8, layers=4)
    tree = StrategyTree(model)
    tree.at("").split(b="dp")
    presets.pipeline(tree, CLUSTER.mesh(pp=2, dp=2), 4, chunks=2)
    tree.schedule(2, "interleaved")
    graph = prove(model, tree)
    stage_of = {t.op: t.stage for t in graph.tasks if t.op}
    held = []
    for task in graph.tasks:
        if task.stream == "gradient":
            weights = {graph.buffers[view.buffer].tensor.removeprefix("grad:") for view in task.reads}
            held.append({stage_of[model.consumers[weight][0]] for weight in weights})
    assert sorted(stage for stages in held for stage in stages) == [0, 1, 2, 3] and all(len(stages) == 1 for stages in held)


@pytest.mark.parametrize("tp", [1, 2])
def test_zero_three_gathers_for_each_use_and_waits_for_the_operator_two_before(tp):
    model = gpt(batch=4)
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=4, tp=tp))
    if tp > 1:
        presets.tensor_parallel(tree)
    presets.zero(tree, 3)
    graph = prove(model, tree)
    gathers = [t for t in graph.tasks if t.stream == "prefetch"]
    assert {t.kind for t in gathers} == {"all_gather"}
    assert {t.phase for t in gathers} == {"forward", "backward"}
    assert all(t.after for t in gathers if t.name.startswith("layers.1"))
    assert count(graph, "reduce_scatter") > 0


def test_zero_bytes_per_parameter():
    """16, 4 + 12/dp, 2 + 14/dp and 16/dp bytes for mixed-precision Adam (ZeRO, section 3), where every tensor divides."""
    model = gpt(batch=8, dtype="bfloat16")
    size = sum(int(np.prod(t.shape)) for t in model.tensors.values() if t.kind == "weight")
    for stage, expected in enumerate((16.0, 4 + 12 / 2, 2 + 14 / 2, 16 / 2)):
        tree = StrategyTree(model)
        presets.data_parallel(tree, CLUSTER.mesh(dp=2))
        if stage:
            presets.zero(tree, stage)
        graph = prove(model, tree)
        assert {sum(graph.static_bytes(device).values()) / size for device in graph.devices} == {expected}


@pytest.mark.parametrize("glob", ["layers.*", "layers.*.mlp", "layers.0.attn.sdpa", ""])
def test_recompute_clones_what_the_backward_reads_and_is_lazy(glob):
    model = llama()
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=2, tp=2))
    presets.tensor_parallel(tree)
    tree.at(glob).recompute()
    tree.schedule(2)
    graph = prove(model, tree)
    again = [t for t in graph.tasks if t.phase == "recompute" and t.kind == "compute"]
    assert bool(again) == (glob != "layers.0.attn.sdpa")  # what an operator alone makes leaves it: nothing to drop
    if glob == "layers.*":
        assert all(t.after for t in again), "not before the gradient of what left the layer"
        assert not any(t.op == "layers.1.mlp_add" for t in again)


@pytest.mark.parametrize("ep", [2, 4])
def test_experts_in_parallel_exchange_tokens_by_all_to_all(ep):
    model = moe()
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=ep))
    presets.expert_parallel(tree)
    graph = prove(model, tree)
    assert count(graph, "all_to_all", "forward") == count(graph, "all_to_all", "backward") == 2  # to the experts and back
    experts = [t for t in graph.tasks if t.kind == "all_reduce" and "experts" in str([graph.buffers[v.buffer].tensor for v in t.reads])]
    assert not experts, "an expert's gradient is whole where it lives"


def test_a_sharded_classifier_gathers_its_input_and_stays_off_the_convolutions():
    (model, *_) = cnns(8)
    mesh = CLUSTER.mesh(dp=4)
    tree = StrategyTree(model)
    presets.data_parallel(tree, mesh)
    tree.at("classifier.fc1").split(b=None, o="dp")
    tree.at("classifier.relu1").split(b=None, o="dp")
    tree.at("classifier.fc2").split(b=None, h="dp")
    graph = prove(model, tree, optimizer="sgd")
    kinds = Counter((t.kind, t.phase) for t in graph.tasks if t.stream == "feature")
    assert kinds["all_gather", "forward"] == 1 and kinds["reduce_scatter", "forward"] == 1
    buckets = {graph.buffers[v.buffer].tensor for t in graph.tasks if t.stream == "gradient" for v in t.reads}
    assert "grad:classifier.fc1.weight" not in buckets and "grad:features.0.0.conv.weight" in buckets


@pytest.mark.parametrize("num_devices", [2, 4])
def test_tables_of_a_recommender_live_on_one_device_each(num_devices):
    model = small_dlrm(num_tables=num_devices)
    mesh = CLUSTER.mesh(dp=num_devices)
    tree = StrategyTree(model)
    presets.data_parallel(tree, mesh)
    for i, device in enumerate(mesh.devices):
        tree.at(f"tables.{i}").map(DeviceMesh.of((device,), one=1))
    graph = prove(model, tree, optimizer="sgd")
    if num_devices == 2:  # a pair's scatter is a message
        assert count(graph, "p2p") > 0
    else:
        assert count(graph, "all_to_all", "forward") == count(graph, "all_to_all", "backward") == 1
        assert count(graph, "scatter") == count(graph, "gather") == 0


@pytest.mark.parametrize("pp", [1, 2])
def test_tied_embeddings(pp):
    model = gpt(batch=8, tied=True)
    tree = StrategyTree(model)
    mesh = CLUSTER.mesh(pp=pp, dp=2, tp=2)
    tree.at("").split(b="dp")
    presets.pipeline(tree, mesh, 2)
    presets.tensor_parallel(tree)
    tree.schedule(4)
    prove(model, tree)


@pytest.mark.parametrize("item", ["optimizer", "grad", "weight", "out"])
def test_offload_to_host_memory(item):
    model = gpt()
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=2))
    host = DeviceMesh.of(("cpu:0",), host=1)
    tree.at("layers.0.mlp_add" if item == "out" else "").store(item, host)
    graph = prove(model, tree, CLUSTER)
    streams = Counter(t.stream for t in graph.tasks)
    assert streams["h2d"] and streams["d2h"]
    if item in ("optimizer", "grad", "weight"):
        assert all(t.devices == ("cpu:0",) for t in graph.tasks if t.op and t.op.startswith("optimizer."))


def test_uneven_parts():
    model = gpt(batch=7)
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=2, tp=3))
    tree.at("layers.*.mlp.*").split()
    presets.tensor_parallel(tree, sequence_parallel=True)
    presets.zero(tree, 2)
    graph = prove(model, tree)
    scattered = [view.box for t in graph.tasks if t.kind == "reduce_scatter" for view in t.writes]
    assert {high - low for box in scattered for low, high in box} >= {1, 2}, "a sequence of 4 in 3 parts"
    assert not count(graph, "p2p"), "uneven parts nest: no collective falls apart into messages"


def test_gradient_buckets_close_when_they_exceed_the_cap():
    """The worked case of the published bucketing rule: caps 1 then 25 MB; 0.6 0.6 20 10 30 2 MB arrive in this order."""
    from apportion.simulator.execution_graph import ExecutionGraph
    from apportion.simulator.lowering import Buckets, Lowering, Message

    low = Lowering(ExecutionGraph("none"), lambda a, b: 1)
    buckets = Buckets(low, 25.0)
    for size in (0.6, 0.6, 20, 10, 30, 2):
        buckets.put([Message("all_reduce", ("gpu:0", "gpu:1"), "feature", [], int(size * 1e6), "w")])
    buckets.flush()
    assert [task.num_bytes / 1e6 for task in low.graph.tasks] == [1.2, 30.0, 30.0, 2.0]


def test_inference_has_no_backward():
    model = llama()
    tree = StrategyTree(model)
    presets.data_parallel(tree, CLUSTER.mesh(dp=2, tp=2))
    presets.tensor_parallel(tree)
    graph = prove(model, tree, training=False)
    assert {task.phase for task in graph.tasks} == {"forward"}


# -- random strategies


@st.composite
def annotations(draw, model: Model, mesh: DeviceMesh):
    """A tree in which any operator may be cut along any of its dims over any axes, and anything may be stored anywhere on the mesh."""
    tree = StrategyTree(model)
    tree.at("").map(mesh)
    if draw(st.booleans()):
        tree.at("").split(b=draw(st.sampled_from(list(mesh.sizes))))
    axes = list(mesh.sizes)
    for op in model.ops.values():
        free = [name for name, (_, kind) in op.dims.items() if kind != Dim.OPAQUE]
        if not free or draw(st.booleans()):
            continue
        said = {}
        for axis in axes:
            name = draw(st.sampled_from([None, *free]))
            if name is not None:
                extent = op.dims[name][0] // (tree.order.num_micro_batches if op.dims[name][1] == Dim.BATCH else 1)
                taken = int(np.prod([mesh.sizes[a] for a in said.get(name, ())]))
                if taken * mesh.sizes[axis] <= extent:
                    said[name] = (*said.get(name, ()), axis)
        tree.at(op.path).split(**({"b": None} | said) if "b" in op.dims else said)
    if draw(st.booleans()):
        tree.at(draw(st.sampled_from(list(model.ops)))).recompute()
    return tree


@pytest.mark.parametrize("model", [gpt(batch=8), moe(batch=8), small_dlrm(8), llama(batch=8, tied=True)], ids=lambda m: m.name)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_random_strategies_compute_the_model(model, data):
    shape = data.draw(st.sampled_from([{"x": 2}, {"x": 3}, {"x": 2, "y": 2}, {"x": 2, "y": 3}]))
    tree = data.draw(annotations(model, CLUSTER.mesh(**shape)))
    if data.draw(st.booleans()):
        tree.at("**").recompute() if data.draw(st.booleans()) else tree.at("").recompute()
    prove(model, tree, CLUSTER, seed=data.draw(st.integers(0, 99)))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shape=st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 2), (4, 1, 1), (4, 2, 1), (4, 1, 2)]),
    micro_batches=st.sampled_from([1, 2, 4]),
    order=st.sampled_from(["1f1b", "gpipe", "interleaved"]),
    zero=st.integers(0, 3),
    sequence_parallel=st.booleans(),
    recompute=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_combinations_of_named_strategies(shape, micro_batches, order, zero, sequence_parallel, recompute, tied, seed):
    pp, dp, tp = shape
    model = gpt(batch=8, layers=4, tied=tied)
    tree = StrategyTree(model)
    tree.at("").split(b="dp")
    chunks = 2 if order == "interleaved" and pp == 2 and micro_batches % pp == 0 else 1
    presets.pipeline(tree, CLUSTER.mesh(pp=pp, dp=dp, tp=tp), 4, chunks=chunks)
    presets.tensor_parallel(tree, sequence_parallel=sequence_parallel)
    if zero:
        presets.zero(tree, zero)
    if recompute:
        tree.at("layers.*").recompute()
    tree.schedule(micro_batches, order)
    prove(model, tree, CLUSTER, seed=seed)
