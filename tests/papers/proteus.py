"""Small models and the comparison that the Proteus tests share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from apportion.core.model_spec import ModelSpec, MoeSpec, RopeSpec
from apportion.simulator.cluster import Cluster
from apportion.simulator.compiler import STATES, compile
from apportion.simulator.execution_graph import ExecutionGraph
from apportion.simulator.interpreter import dense, run
from apportion.simulator.models.transformer import transformer
from apportion.simulator.ops import Model
from apportion.simulator.strategy_tree import StrategyTree

SPEC = ModelSpec(
    architecture="tiny", num_layers=2, hidden=8, num_heads=4, num_kv_heads=4, head_dim=2, ffn=12, vocab=16, max_position=64,
    dtype="float32",
    rope=RopeSpec(), norm_eps=1e-5, tied=False, windows=(None, None),
)  # fmt: skip


def gpt(batch: int = 4, *, layers: int = 2, tied: bool = False, dtype: str = "float32") -> Model:
    spec = replace(SPEC, num_layers=layers, tied=tied, windows=(None,) * layers, dtype=dtype)
    return transformer(spec, batch, 4, gated=False, name="gpt")


def unfused(batch: int = 4) -> Model:
    """As before FlashAttention, with dropout; its masks let everything pass."""
    return transformer(SPEC, batch, 4, gated=False, fused_attention=False, dropout=True, name="unfused")


def llama(batch: int = 4, *, layers: int = 2, tied: bool = False) -> Model:
    return transformer(replace(SPEC, num_layers=layers, tied=tied, windows=(None,) * layers, num_heads=8), batch, 4, name="llama")


def moe(batch: int = 4, num_experts: int = 4) -> Model:
    return transformer(replace(SPEC, moe=MoeSpec(num_experts, 2, 6, (1,))), batch, 4, name="moe")


def arrays_of(model: Model, optimizer: str = "adam", seed: int = 0) -> dict[str, np.ndarray]:
    """Random data for everything a run needs; ids stay inside every table and label set of the model."""
    draw = np.random.default_rng(seed)
    rows = min((model.ops[p].dims["v"][0] for p in model.ops if "v" in model.ops[p].dims), default=1)
    arrays = {}
    for tensor in model.tensors.values():
        if tensor.kind == "input":
            arrays[tensor.name] = draw.integers(0, rows, tensor.shape) if tensor.dtype == "int32" else draw.uniform(0, 1, tensor.shape)
        elif tensor.kind == "weight":
            gain = np.sqrt(2 / np.prod(tensor.shape[1:]))  # keeps activations, and so every gradient, alive through ReLUs
            arrays[tensor.name] = draw.uniform(0.2, 1, tensor.shape) if len(tensor.shape) == 1 else draw.normal(0, gain, tensor.shape)
            for i in range(STATES[optimizer] + (tensor.itemsize < 4)):
                arrays[f"{tensor.name}.state{i}"] = draw.uniform(0.1, 1, tensor.shape)
    return arrays


def prove(
    model: Model,
    tree: StrategyTree,
    cluster: Cluster | None = None,
    *,
    optimizer: str = "adam",
    training: bool = True,
    seed: int | None = 0,
) -> ExecutionGraph:
    """Compile, run in an order drawn at random, and compare every result with the dense model's."""
    graph = compile(model, tree, cluster, training=training, optimizer=optimizer)
    arrays = arrays_of(model, optimizer)
    expected = dense(model, arrays, optimizer if training else None)
    got = run(graph, arrays, seed)
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-7, atol=1e-10, err_msg=name)
    return graph


def count(graph: ExecutionGraph, kind: str, phase: str | None = None) -> int:
    return sum(task.kind == kind and phase in (None, task.phase) for task in graph.tasks)
