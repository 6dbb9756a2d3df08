"""Model + strategy -> execution graph (Proteus, section 5): stages, parts of operators, moves between layouts, backward, update.

Where the paper leaves a choice, ours is:
- An output that is partial is reduced straight into the layout its readers want, if they agree: sequence parallelism needs no annotation of
  the sum. What nobody reads stays partial.
- A copy of an activation that is larger than the stored shard (an all-gather's) is made again for the backward pass, as Megatron does; one
  that is not (of another stage, of an all-to-all) is kept.
- Uses of a weight in several places (tied embeddings) are further terms of the same gradient (`gradients.py` says when it is reduced).
- Parameters stored elsewhere are fetched for every use and dropped after it.
- A device updates its weights when all its gradients are reduced, as frameworks do, unless `tree.optimizer_overlap`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

from apportion.core.errors import InvalidParameter
from apportion.simulator.cluster import Cluster
from apportion.simulator.execution_graph import ExecutionGraph
from apportion.simulator.gradients import WeightGradients, merged
from apportion.simulator.layout import Layout, Shard, volume
from apportion.simulator.lowering import Buckets, Lowering, Message, Value, boxes_as_parts
from apportion.simulator.ops import ITEMSIZE, LOSSES, Dim, Model, Op, Operand, backward, gradient, passes_through
from apportion.simulator.propagation import Placement, place, resolve, stages_of, stored
from apportion.simulator.schedule import BACKWARD, FORWARD, Action, actions_of, merge
from apportion.simulator.strategy_tree import StrategyTree

STATES = {"sgd": 1, "adam": 2}  # float32 tensors beside each weight: momentum; two moments. Of 16-bit weights, a float32 copy too.


def compile(
    model: Model, tree: StrategyTree, cluster: Cluster | None = None, *, training: bool = True, optimizer: str = "adam"
) -> ExecutionGraph:
    """The graph of one iteration. cluster: who is near whom, where a replica may be chosen; None: all are equally far.

    Errors: InvalidParameter, naming the path, for a strategy that cannot be; for a schedule that deadlocks, naming two ranks.
    """
    if optimizer not in STATES:
        raise InvalidParameter(f"unknown optimizer {optimizer!r}; known: {', '.join(STATES)}")
    if tree.grad_dtype is not None and tree.grad_dtype not in ITEMSIZE:
        raise InvalidParameter(f"unknown grad_dtype {tree.grad_dtype!r}; known: {', '.join(ITEMSIZE)}")
    if tree.bucket_mb <= 0:
        raise InvalidParameter(f"bucket_mb must be positive, got {tree.bucket_mb:g}")
    if tree.prefetch < 1:
        raise InvalidParameter(f"prefetch must be at least 1, got {tree.prefetch}")
    compiler = _Compiler(model, tree, cluster, optimizer)
    compiler.run(training)
    compiler.graph.check()
    return compiler.graph


class _Compiler:
    def __init__(self, model: Model, tree: StrategyTree, cluster: Cluster | None, optimizer: str) -> None:
        self.model, self.tree, self.optimizer = model, tree, optimizer
        self.configs = resolve(tree)
        self.graph = ExecutionGraph(model.name)
        self.low = Lowering(self.graph, cluster.distance if cluster else lambda a, b: int(a != b))
        self.num_micro_batches = tree.order.num_micro_batches
        self.stages, self.ranks = stages_of(model, self.configs)
        self.stage_of = {op.path: i for i, stage in enumerate(self.stages) for op in stage}
        self.placements: dict[tuple[str, int], Placement] = {}
        self.values: dict[tuple[str, int | None], Value] = {}
        self.copies: dict[tuple[str, int], dict[tuple[Layout, str], Value]] = defaultdict(dict)
        self.contributions: dict[tuple[str, int], list[Value]] = defaultdict(list)
        self.gradients: dict[tuple[str, int], Value] = {}
        self.gradient_layouts: dict[tuple[str, int], Layout] = {}
        self.made: dict[tuple[str, int], Value] = {}  # what is stored elsewhere, where it was computed: the forward pass reads it there
        self.backward_ops = self._backward_ops()
        self.expected = Counter(tensor for path in self.backward_ops for tensor in self._gradients_made(path))
        self.buckets = Buckets(self.low, tree.bucket_mb)
        self.weight_gradients = WeightGradients(
            self.low, self.buckets, self.expected, self.num_micro_batches, self._gradient_layout, self._gradient_in_shards
        )
        self.messages: list[Message] = []

    def run(self, training: bool) -> None:
        for tensor in self.model.tensors.values():
            if tensor.kind == "weight" and self.model.consumers[tensor.name]:
                self.values[tensor.name, None] = self.low.initial(tensor.name, self._weight_layout(tensor.name), tensor.itemsize, "weight")
        for action in self._order(training):
            self.low.phase, self.low.stage, self.low.micro_batch = action.phase, action.stage, action.micro_batch
            self.low.history = []
            if action.phase == FORWARD:
                self._forward(self.stages[action.stage], action.micro_batch, FORWARD)
                self._hand_over(action.stage, action.micro_batch)
            else:
                self._backward(self.stages[action.stage], action.micro_batch)
                self.weight_gradients.end_backward(action.stage)
        self._record_outputs()
        if training:
            self.weight_gradients.finish()
            self._update()

    # -- order

    def _order(self, training: bool) -> list[Action]:
        num_ranks = max(self.ranks) + 1
        held = [[i for i, r in enumerate(self.ranks) if r == rank] for rank in range(num_ranks)]
        if not training:
            return [Action(FORWARD, s, m) for m in range(self.num_micro_batches) for s in range(len(self.stages))]
        lists = [actions_of(rank, stages, num_ranks, self.tree.order) for rank, stages in enumerate(held)]
        before: dict[int, set[int]] = defaultdict(set)
        for op in self.model.ops.values():
            for operand in op.inputs:
                if (producer := self.model.producer.get(operand.tensor)) and self.stage_of[producer] != self.stage_of[op.path]:
                    before[self.stage_of[op.path]].add(self.stage_of[producer])

        def needs(action: Action) -> list[Action]:
            if action.phase == FORWARD:
                return [Action(FORWARD, s, action.micro_batch) for s in sorted(before[action.stage])]
            later = [Action(BACKWARD, s, action.micro_batch) for s in before if action.stage in before[s]]
            return [Action(FORWARD, action.stage, action.micro_batch), *later]

        return merge(lists, needs)

    # -- forward

    def _placement(self, op: Op, micro_batch: int) -> Placement:
        key = (op.path, micro_batch)
        if key not in self.placements:
            self.placements[key] = place(op, self.configs[op.path], micro_batch, self.num_micro_batches)
        return self.placements[key]

    def _forward(self, ops: list[Op], m: int, phase: str) -> None:
        for op in ops:
            (operand,) = op.outputs
            tensor = self.model.tensors[operand.tensor]
            placement = self._placement(op, m)
            inputs = [self._fetch(i, placement.needed(i, self._shape(i)), m, phase) for i in op.inputs]
            self._send()
            raw = placement.layout(operand, tensor.shape)
            kind = "partial" if raw.num_terms > 1 and self.model.consumers[tensor.name] else "activation"
            (value,) = self.low.compute(op, placement, inputs, [(raw, tensor.itemsize, kind)])
            layout = self._activation_layout(op, operand, raw, m)
            self.values[tensor.name, m] = self.low.move(value, layout, "activation", self.messages)
            self.copies.pop((tensor.name, m), None)  # of the value that is computed again: nobody reads it any more
            self._send()
            elsewhere = layout.devices != raw.devices
            self.gradient_layouts[tensor.name, m] = raw.summed() if elsewhere else layout
            if elsewhere and raw.num_terms == 1 and phase == FORWARD:
                self.made[tensor.name, m] = value

    def _hand_over(self, stage: int, m: int) -> None:
        """Send what later stages read as soon as it is there."""
        for op in self.stages[stage]:
            for path in self.model.consumers[op.path]:
                if self.stage_of[path] != stage:
                    reader, placement = self.model.ops[path], self._placement(self.model.ops[path], m)
                    for operand in reader.inputs:
                        if operand.tensor == op.path:
                            self._fetch(operand, placement.needed(operand, self._shape(operand)), m, FORWARD)
        self._send()

    def _fetch(self, operand: Operand, needed: Layout, m: int, phase: str) -> Value:
        """A tensor as an operator reads it. Local parts are views; what moves is shared by all readers of a phase that need the same."""
        tensor = self.model.tensors[operand.tensor]
        copies = self.copies[tensor.name, m]
        if tensor.kind == "input":
            if (needed, "data") not in copies:
                copies[needed, "data"] = self.low.initial(tensor.name, needed, tensor.itemsize, "input")
            return copies[needed, "data"]
        weight = tensor.kind == "weight"
        value = self.values[tensor.name, None if weight else m]
        if phase == FORWARD and (tensor.name, m) in self.made:
            value = self.made[tensor.name, m]
        offloaded = any(device.startswith("cpu") for device in value.layout.devices)
        kept = not weight and not offloaded and not _grows(value.layout, needed)
        key = (needed, "kept" if kept else phase)
        if key not in copies:
            copies[key] = self.low.move(value, needed, "gathered", self.messages, self.tree.prefetch if weight else None)
        return copies[key]

    def _activation_layout(self, op: Op, operand: Operand, raw: Layout, m: int) -> Layout:
        config = self.configs[op.path]
        if "out" in config.memory:
            return stored(op.path, operand, raw, config, config.memory["out"], self._shape(operand))
        readers = self.model.consumers[operand.tensor]
        if raw.num_terms == 1 or not readers:
            return raw
        wanted = {
            self._placement(self.model.ops[path], m).needed(i, self._shape(i))
            for path in readers
            for i in self.model.ops[path].inputs
            if i.tensor == operand.tensor
        }
        if len(wanted) == 1 and (layout := wanted.pop()).devices == raw.devices:
            return layout
        return raw.summed()

    # -- backward

    def _backward_ops(self) -> dict[str, list[Op]]:
        """Operators that a loss depends on and that depend on a weight, last first, with their backward operators."""
        found: dict[str, list[Op]] = {}
        reached: set[str] = set()
        for op in reversed(self.model.ops.values()):
            out = op.outputs[0].tensor
            if (op.kind in LOSSES or out in reached) and out in self.model.differentiable:
                found[op.path] = backward(self.model, op)
                reached |= {operand.tensor for operand in op.inputs} & self.model.differentiable
        return found

    def _gradients_made(self, path: str) -> list[str]:
        op = self.model.ops[path]
        through = [op.inputs[i].tensor for i in passes_through(op) if op.inputs[i].tensor in self.model.differentiable]
        return through + [operand.tensor for b in self.backward_ops[path] for operand in b.outputs]

    def _backward(self, stage: list[Op], m: int) -> None:
        scopes = set()
        for op in reversed(stage):
            if op.path not in self.backward_ops:
                continue
            scope = self.configs[op.path].recompute
            if scope is not None and scope not in scopes:
                scopes.add(scope)
                self._recompute([o for o in stage if self.configs[o.path].recompute == scope], m)
            placement = self._placement(op, m)
            for i in passes_through(op):
                if op.inputs[i].tensor in self.model.differentiable:
                    self._contribute(op.inputs[i].tensor, f"{op.path}.through{i}", self.gradients[op.outputs[0].tensor, m], m)
            self._send()
            for b in self.backward_ops[op.path]:
                self._backward_op(b, placement, m)

    def _backward_op(self, b: Op, placement: Placement, m: int) -> None:
        inputs = []
        for operand in b.inputs:
            if operand.tensor.startswith("grad:"):
                of = operand.tensor.removeprefix("grad:")
                needed = placement.needed(operand, self.model.tensors[of].shape)
                inputs.append(self.low.move(self.gradients[of, m], needed, "gathered", self.messages))
            else:
                inputs.append(self._fetch(operand, placement.needed(operand, self._shape(operand)), m, BACKWARD))
        self._send()
        outputs = []
        for operand in b.outputs:
            tensor = self.model.tensors[operand.tensor]
            raw = placement.layout(operand, tensor.shape)
            itemsize = tensor.itemsize if tensor.kind != "weight" else max(tensor.itemsize, ITEMSIZE[self.tree.grad_dtype or tensor.dtype])
            outputs.append((raw, itemsize, "partial" if raw.num_terms > 1 or tensor.kind == "weight" else "activation"))
        made = replace(b, outputs=tuple(Operand(gradient(o.tensor), o.dims) for o in b.outputs))
        for operand, value in zip(b.outputs, self.low.compute(made, placement, inputs, outputs), strict=True):
            self._contribute(operand.tensor, b.path, value, m)
        self._send()

    def _recompute(self, ops: list[Op], m: int) -> None:
        """Emit again what these operators made and their backward reads, except what leaves them; not before its gradients are there."""
        inside = {op.path for op in ops}
        leaving = {path for path in inside if not set(self.model.consumers[path]) <= inside}
        needed = {o.tensor for path in inside for b in self.backward_ops.get(path, ()) for o in b.inputs} & inside - leaving
        for op in reversed(ops):
            if op.path in needed:
                needed |= {operand.tensor for operand in op.inputs} & inside - leaving
        incoming = [self.gradients[path, m] for path in leaving if (path, m) in self.gradients]
        self.low.lazy = frozenset(t for value in incoming for view in value.views.values() for t in self.low.writers[view.buffer])
        self.low.phase = "recompute"
        self._forward([op for op in ops if op.path in needed], m, "recompute")
        self.low.phase, self.low.lazy = BACKWARD, frozenset()

    def _contribute(self, tensor: str, source: str, value: Value, m: int) -> None:
        """One more term of a gradient; with the last one it is summed and sent where it is wanted."""
        if self.model.tensors[tensor].kind == "weight":
            self.weight_gradients.add(tensor, source, value, m)
            return
        arrived = self.contributions[tensor, m]
        arrived.append(value)
        if len(arrived) == self.expected[tensor]:
            self.gradients[tensor, m] = self._sum(tensor, merged(self.low, tensor, arrived), self.gradient_layouts[tensor, m])

    def _sum(self, tensor: str, values: list[Value], target: Layout) -> Value:
        """In the target layout; the caller sends what has to move."""
        total: Value | None = None
        for value in values:
            moved = self.low.move(value, target, "activation", self.messages)
            if total is not None:
                self._send()
            total = moved if total is None else self.low.add(f"{gradient(tensor)}.sum", total, moved, "activation", False)
        assert total is not None
        return total

    # -- weights

    def _update(self) -> None:
        self.low.phase, self.low.micro_batch, self.low.history = "optimizer", None, []
        if not self.tree.optimizer_overlap:
            self.low.barrier = self._last_reductions()
        for tensor, values in self.weight_gradients.done.items():
            self.low.stage = self.stage_of[self.model.consumers[tensor][0]]
            grad = self._sum(tensor, values, self._gradient_layout(tensor))
            self._send()
            self.graph.results[gradient(tensor)] = [(grad.views[s.device], s.term) for s in grad.layout.shards]
            self._update_weight(tensor, grad)
        self.buckets.flush()
        for tensor in self.weight_gradients.done:
            value = self.values[tensor, None]
            self.graph.results[tensor] = [(value.views[s.device], s.term) for s in value.layout.shards]

    def _last_reductions(self) -> dict[str, frozenset[int]]:
        """Per device the last gradient message of each kind: they go in order, so whoever waits for these waits for all."""
        last: dict[str, dict[str, int]] = defaultdict(dict)
        for task in self.graph.tasks:
            if task.stream == "gradient":
                for device in task.devices:
                    last[device][f"{task.kind} {task.devices}"] = task.id
        return {device: frozenset(tasks.values()) for device, tasks in last.items()}

    def _update_weight(self, name: str, grad: Value) -> None:
        tensor, old = self.model.tensors[name], self.values[name, None]
        layout = self._stored_weight(name, ("weight", "grad", "optimizer"))
        dims = tuple(f"d{i}" for i in range(len(tensor.shape)))
        num_states = STATES[self.optimizer] + (tensor.itemsize < 4)
        states = [self.low.initial(f"{name}.state{i}", layout, 4, "state") for i in range(num_states)]
        inputs = [self.low.move(value, layout, "gathered", self.messages) for value in (old, grad)]
        self._send()
        op = Op(
            f"optimizer.{name}",
            self.optimizer,
            {d: (extent, Dim.OTHER) for d, extent in zip(dims, tensor.shape, strict=True)},
            tuple(Operand(n, dims) for n in (name, gradient(name), *(s.tensor for s in states))),
            tuple(Operand(n, dims) for n in (name, *(s.tensor for s in states))),
        )
        outputs = [(layout, tensor.itemsize, "weight"), *((layout, 4, "state") for _ in states)]
        over = {0: old, **{i + 1: state for i, state in enumerate(states)}}
        made = self.low.compute(op, boxes_as_parts(layout, dims), [*inputs, *states], outputs, over)
        gathered: list[Message] = []
        self.values[name, None] = self.low.move(made[0], old.layout, "weight", gathered, over=old)
        self.buckets.put(gathered)
        for state in made[1:]:
            self.graph.results[state.tensor] = [(state.views[s.device], s.term) for s in state.layout.shards]

    def _weight_layout(self, name: str) -> Layout:
        return self._stored_weight(name, ("weight",))

    def _gradient_layout(self, name: str) -> Layout:
        return self._stored_weight(name, ("weight", "grad"))

    def _gradient_in_shards(self, name: str) -> bool:
        return any(self.configs[path].memory.keys() & {"weight", "grad"} for path in self.model.consumers[name])

    def _stored_weight(self, name: str, items: tuple[str, ...]) -> Layout:
        """By the last of these memory configs that each reader has; readers on other devices hold copies."""
        shards: list[Shard] = []
        for path in self.model.consumers[name]:
            op, config = self.model.ops[path], self.configs[path]
            storage = next((config.memory[item] for item in reversed(items) if item in config.memory), None)
            operand = next(i for i in op.inputs if i.tensor == name)
            natural = self._placement(op, 0).needed(operand, self._shape(operand))
            mine = stored(path, operand, natural, config, storage, self._shape(operand))
            known = Layout(tuple(shards))
            if not shards or (not known.devices & mine.devices and set(known.by_box) == set(mine.by_box)):
                shards += mine.shards
        return Layout(tuple(shards))

    # -- small things

    def _shape(self, operand: Operand) -> tuple[int, ...]:
        return self.model.tensors[operand.tensor].shape

    def _send(self) -> None:
        self.low.send(self.messages)
        self.messages.clear()

    def _record_outputs(self) -> None:
        for (name, m), value in self.values.items():
            if m is not None and not self.model.consumers[name]:
                offset = m * value.layout.num_terms
                found = [(value.views[s.device], s.term + offset) for s in value.layout.shards]
                self.graph.results.setdefault(name, []).extend(found)


def _grows(stored: Layout, needed: Layout) -> bool:
    """Whether the copy that a reader needs is larger than what its devices store already."""
    here = [shard for shard in needed.shards if shard.device in stored.of]
    return any(volume(shard.box) > volume(stored.of[shard.device].box) for shard in here)
