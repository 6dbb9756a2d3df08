"""Executes an execution graph numerically on numpy shards, and a model without one: the proof that a strategy computes the model.

A buffer is an array of its own; a task sees only the views it names; memory that another buffer takes over is gone. So a missing edge, a
wrong collective or a wrong box is a NaN, a KeyError or a wrong number, whatever order is drawn among those that the edges allow.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np

from apportion.core.errors import InternalError, InvalidParameter
from apportion.simulator.execution_graph import COMPUTE, ExecutionGraph, Piece, Task, View
from apportion.simulator.layout import Box, intersect
from apportion.simulator.numpy_ops import KERNELS, Array
from apportion.simulator.ops import LOSSES, Model, Op, Operand, backward, gradient, passes_through


def run(graph: ExecutionGraph, arrays: Mapping[str, Array], seed: int | None = None) -> dict[str, Array]:
    """The graph's results as whole arrays. arrays: inputs, weights and states ('<weight>.state<i>') by name.

    seed: run in an order drawn among those that the edges allow; None: in program order.
    Errors: InternalError where a graph is wrong: replicas that disagree, memory that is read after it was taken over.
    """
    held: dict[int, Array] = {}
    for buffer in graph.buffers:
        if buffer.kind in ("input", "weight", "state") and not graph.writers.get(buffer.id):  # there from the start
            if buffer.tensor not in arrays:
                raise InvalidParameter(f"the run needs an array for {buffer.tensor!r}")
            held[buffer.id] = arrays[buffer.tensor][_slices(buffer.box)].copy()
    interpreter = _Interpreter(graph, held)
    for task in _order(graph, seed):
        interpreter.execute(graph.tasks[task])
    return {name: interpreter.assemble(name, parts) for name, parts in graph.results.items()}


class _Interpreter:
    def __init__(self, graph: ExecutionGraph, held: dict[int, Array]) -> None:
        self.graph, self.held = graph, held

    def read(self, view: View) -> Array:
        if view.buffer not in self.held:
            buffer = self.graph.buffers[view.buffer]
            raise InternalError(f"{buffer.tensor!r} on {buffer.device} is read before it is written or after its memory was taken over")
        return self.held[view.buffer][_slices(view.box, self.graph.buffers[view.buffer].box)]

    def write(self, view: View, value: Array) -> None:
        buffer = self.graph.buffers[view.buffer]
        if buffer.in_place_of is not None:
            self.held.pop(buffer.in_place_of, None)
        if view.buffer not in self.held:
            self.held[view.buffer] = np.full([high - low for low, high in buffer.box], np.nan)
        self.held[view.buffer][_slices(view.box, buffer.box)] = value

    def execute(self, task: Task) -> None:
        if task.kind == COMPUTE and task.op is not None:
            op, (piece,) = self.graph.ops[task.op], task.pieces
            inputs = [self.read(view).copy() for view in piece.reads]
            shapes = [tuple(high - low for low, high in view.box) for view in piece.writes]
            made = KERNELS[op.kind](op, task.part, inputs, shapes)
            for view, value, shape in zip(piece.writes, made, shapes, strict=True):
                if value.shape != shape:
                    raise InternalError(f"{task.name} made {value.shape} where {shape} was planned")
                self.write(view, value)
            return
        moved = [(view, value) for piece in task.pieces for view, value in self.communicate(task, piece)]
        for view, value in moved:
            self.write(view, value)

    def communicate(self, task: Task, piece: Piece) -> list[tuple[View, Array]]:
        """What the members of a communication end up with: a box of the sum, or of what the others have."""
        sent = [(view.box, self.read(view).copy()) for view in piece.reads]
        if task.kind in ("all_reduce", "reduce_scatter"):
            whole = sent[0][0]
            if any(box != whole for box, _ in sent):
                raise InternalError(f"{task.kind} of {task.name} sums boxes that differ")
            total = np.sum([value for _, value in sent], axis=0)
            return [(view, total[_slices(view.box, whole)]) for view in piece.writes]
        received = []
        for view in piece.writes:
            value = np.full([high - low for low, high in view.box], np.nan)
            for box, part in sent:
                if (both := intersect(box, view.box)) is not None:
                    value[_slices(both, view.box)] = part[_slices(both, box)]
            received.append((view, value))
        return received

    def assemble(self, name: str, parts: list[tuple[View, int]]) -> Array:
        """The sum over terms; devices that hold the same box of the same term must agree."""
        once: dict[tuple[Box, int], Array] = {}
        for view, term in parts:
            value = self.read(view)
            if not np.allclose(once.setdefault((view.box, term), value), value, rtol=1e-12, atol=0):
                raise InternalError(f"replicas of {name!r} disagree")
        rank = len(parts[0][0].box)
        whole = np.zeros([max(box[i][1] for box, _ in once) for i in range(rank)])
        for (box, _), value in once.items():
            whole[_slices(box)] += value
        return whole


def _order(graph: ExecutionGraph, seed: int | None) -> list[int]:
    if seed is None:
        return list(range(len(graph.tasks)))
    draw = random.Random(seed)
    waiting = [len(before) for before in graph.predecessors]
    followers: list[list[int]] = [[] for _ in graph.tasks]
    for task, before in enumerate(graph.predecessors):
        for p in before:
            followers[p].append(task)
    ready = [task for task, count in enumerate(waiting) if not count]
    order = []
    while ready:
        at = draw.randrange(len(ready))
        ready[at], ready[-1] = ready[-1], ready[at]
        order.append(ready.pop())
        for task in followers[order[-1]]:
            waiting[task] -= 1
            if not waiting[task]:
                ready.append(task)
    if len(order) != len(graph.tasks):
        raise InternalError(f"{len(graph.tasks) - len(order)} tasks wait for one another in a cycle")
    return order


def _slices(box: Box, inside: Box | None = None) -> tuple[slice, ...]:
    origin = [low for low, _ in inside] if inside is not None else [0] * len(box)
    return tuple(slice(low - o, high - o) for (low, high), o in zip(box, origin, strict=True))


def dense(model: Model, arrays: Mapping[str, Array], optimizer: str | None = "adam") -> dict[str, Array]:
    """The same results as `run`, computed by the model alone: no strategy, devices, parts or micro-batches. None: forward only."""
    values = dict(arrays)
    for op in model.ops.values():
        values.update(_apply(model, op, values))
    results = {name: values[name] for name in model.producer if not model.consumers[name]}
    if optimizer is None:
        return results
    for op in reversed(model.ops.values()):
        out = op.outputs[0].tensor
        if out not in model.differentiable or (op.kind not in LOSSES and gradient(out) not in values):
            continue
        made = [(op.inputs[i].tensor, values[gradient(out)]) for i in passes_through(op) if op.inputs[i].tensor in model.differentiable]
        for b in backward(model, op):
            whole = _apply(model, b, values, as_list=True)
            made += [(operand.tensor, whole[str(i)]) for i, operand in enumerate(b.outputs)]
        for tensor, value in made:
            values[gradient(tensor)] = values[gradient(tensor)] + value if gradient(tensor) in values else value
    for weight in (tensor.name for tensor in model.tensors.values() if tensor.kind == "weight"):
        if gradient(weight) in values:
            results |= _update(weight, values, optimizer)
    return results


def _apply(model: Model, op: Op, values: Mapping[str, Array], as_list: bool = False) -> dict[str, Array]:
    part = {name: (0, extent) for name, (extent, _) in op.dims.items()}
    shapes = [model.tensors[operand.tensor].shape for operand in op.outputs]
    made = KERNELS[op.kind](op, part, [values[operand.tensor] for operand in op.inputs], shapes)
    return {str(i) if as_list else operand.tensor: value for i, (operand, value) in enumerate(zip(op.outputs, made, strict=True))}


def _update(name: str, values: Mapping[str, Array], optimizer: str) -> dict[str, Array]:
    states = [n for i in range(3) if (n := f"{name}.state{i}") in values]
    operands = tuple(Operand(n, ()) for n in (name, gradient(name), *states))
    op = Op(f"optimizer.{name}", optimizer, {}, operands, ())
    made = KERNELS[optimizer](op, {}, [values[o.tensor] for o in operands], [])
    return {gradient(name): values[gradient(name)], **dict(zip((name, *states), made, strict=True))}
