"""What a compute task has to do, in numbers: operations and bytes, and the shape of its matrix product. Knows operators, no devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apportion.core.errors import Unsupported
from apportion.simulator.execution_graph import ExecutionGraph, Task
from apportion.simulator.layout import volume
from apportion.simulator.ops import Op

# Kinds that stream their operands once and compute little beside.
STREAMING = frozenset(
    {"add", "relu", "gelu", "silu_mul", "layer_norm", "rms_norm", "cross_entropy", "bce", "max_pool", "avg_pool", "scale_shift",
     "stack", "concat", "route", "nonzero", "softmax", "mul", "adam", "sgd"}
)  # fmt: skip
DTYPE_OF_SIZE = {1: "float8_e4m3fn", 2: "bfloat16", 4: "float32", 8: "float64"}
LOOKUPS = ("embedding", "embedding_bag")


@dataclass(frozen=True)
class Work:
    """kind: gemm, attention, stream, or fused (done in a neighbour's kernel, num_bytes on top of it). flops and bytes of memory traffic.

    m, n, k, batch: of a product [batch, m, k] x [batch, k, n].

    Attention: batch sequences-times-KV-heads, m queries of a KV head (tokens x heads of the group), n keys, k head dim; causal.
    """

    kind: str
    dtype: str
    flops: float
    num_bytes: float
    m: int = 1
    n: int = 1
    k: int = 1
    batch: int = 1


def work_of(graph: ExecutionGraph, task: Task) -> Work:
    """Of a compute task or a copy. Error: Unsupported for an operator whose work is not known, by path and kind."""
    sizes = [volume(view.box) * graph.buffers[view.buffer].itemsize for view in (*task.reads, *task.writes)]
    num_bytes = float(sum(sizes))
    if task.op is None:
        return Work("stream", "none", 0.0, num_bytes)
    op = graph.ops[task.op]
    if op.attrs.get("fused") and task.phase in ("forward", "recompute"):  # a bias in its product's epilogue; a mask that is drawn in place
        return Work("fused", "none", 0.0, float(sizes[-1]) if op.kind == "nonzero" else 0.0)
    kind = op.kind.removesuffix(".grad").removesuffix("0").removesuffix("1").removesuffix(".grad")
    dtype = DTYPE_OF_SIZE[graph.buffers[task.reads[-1].buffer].itemsize]  # what is multiplied, not what is summed in
    if kind == "einsum":
        return _einsum(op, task, dtype, num_bytes)
    if kind == "conv2d":
        return _conv(task, op, dtype, num_bytes)
    if kind == "attention":
        return _attention(task, op, dtype, num_bytes)
    if kind in ("scores", "attend"):
        return _scores(task, op, dtype, num_bytes)
    if kind in LOOKUPS:
        return Work("stream", dtype, 0.0, _lookup_bytes(graph, task, op, sizes))
    if kind in STREAMING:
        return Work("stream", dtype, num_bytes, num_bytes)
    raise Unsupported(f"the cost of {op.path!r} is not known: its kind {op.kind!r} is none of {', '.join(sorted(STREAMING))}, "
                      "einsum, conv2d, attention, embedding")  # fmt: skip


def _einsum(op: Op, task: Task, dtype: str, num_bytes: float) -> Work:
    """m, n, k by where a dim stands: in one input and the output, in the other and the output, in both inputs alone."""
    extent = {name: high - low for name, (low, high) in task.part.items()}
    if len(op.inputs) == 1:  # a sum over dims: the gradient of a bias
        return Work("stream", dtype, num_bytes, num_bytes)
    a, b = ({name for name in operand.dims if name} for operand in op.inputs[:2])
    out = {name for name in op.outputs[0].dims if name}
    k = math.prod(extent[name] for name in (a | b) - out)
    if k == 1 and (a <= out and b <= out):
        return Work("stream", dtype, num_bytes, num_bytes)
    m, n = (math.prod(extent[name] for name in (one - other) & out) for one, other in ((a, b), (b, a)))
    batch = math.prod(extent[name] for name in a & b & out)
    return Work("gemm", dtype, 2.0 * batch * m * n * k, num_bytes, m, n, k, batch)


def _conv(task: Task, op: Op, dtype: str, num_bytes: float) -> Work:
    """As an implicit product: places x outputs x (inputs x window); its two gradients are products of the same size."""
    extent = {name: high - low for name, (low, high) in task.part.items()}
    window = int(op.attrs.get("window", 0)) or _window(task, op)
    places, inner = extent["b"] * extent["y"] * extent["x"], extent["c"] * window
    m, n, k = {"0": (places, inner, extent["o"]), "1": (extent["o"], inner, places)}.get(op.kind[-1], (places, extent["o"], inner))
    return Work("gemm", dtype, 2.0 * places * extent["o"] * inner, num_bytes, m, n, k)


def _window(task: Task, op: Op) -> int:
    """Places of the window: of the weight [o, c, height, width], which one operand is."""
    views = [*task.reads, *task.writes]
    for operand, view in zip((*op.inputs, *op.outputs), views, strict=True):
        if operand.dims[:2] == ("o", "c"):
            return math.prod(high - low for low, high in view.box[2:])
    raise Unsupported(f"the cost of {op.path!r} is not known: no operand of {op.kind!r} is a weight [o, c, height, width]")


def _attention(task: Task, op: Op, dtype: str, num_bytes: float) -> Work:
    """Causal: half of the score matrix. The backward pass recomputes scores and makes four products instead of two: 2.5 times."""
    extent = {name: high - low for name, (low, high) in task.part.items()}
    tokens, groups, heads, head_dim = extent["s"], extent["g"], extent["r"], extent["d"]
    flops = 4.0 * extent["b"] * groups * heads * tokens * tokens * head_dim * 0.5
    return Work(
        "attention", dtype, flops * (2.5 if op.kind.endswith(".grad") else 1.0), num_bytes,
        m=tokens * heads, n=tokens, k=head_dim, batch=extent["b"] * groups,
    )  # fmt: skip


def _scores(task: Task, op: Op, dtype: str, num_bytes: float) -> Work:
    """A product with the whole score matrix; its backward pass is two."""
    e = {name: high - low for name, (low, high) in task.part.items()}
    m, batch, times = e["s"] * e["r"], e["b"] * e["g"], 2 if op.kind.endswith(".grad") else 1
    return Work("gemm", dtype, 2.0 * times * batch * m * e["t"] * e["d"], num_bytes, m, e["t"], e["d"], batch * times)


def _lookup_bytes(graph: ExecutionGraph, task: Task, op: Op, sizes: list[int]) -> float:
    """Rows that are looked up, not the table; the gradient clears and writes a whole table."""
    if op.kind.endswith(".grad"):
        return float(sum(sizes))
    ids, out = task.reads[0], task.writes[0]
    width = task.part["m"][1] - task.part["m"][0]
    return volume(ids.box) * (4 + width * graph.buffers[out.buffer].itemsize) + float(sizes[-1])
