"""A pipeline of equal layers as a graph of stages: one layer is simulated in full, a stage is its layers end to end.

Replicas of one layer behave alike, so one device per pipeline rank stands for its slice of the mesh; what the others send at the same time
is in the cost of its messages (`bundle`). A graph of 105 layers on 280 devices so has as many tasks as it has stages and micro-batches, and
runs in the same executor. Held to the full graph by tests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.simulator.cluster import Cluster, DeviceMesh
from apportion.simulator.compiler import compile
from apportion.simulator.cost.model import CostModel
from apportion.simulator.execution_graph import COMPUTE, Buffer, ExecutionGraph, Piece, Task, View
from apportion.simulator.htae import Behaviour, Cost, execute
from apportion.simulator.memory import Overheads, memory_of
from apportion.simulator.ops import ITEMSIZE
from apportion.simulator.plan import Plan, Workload, strategy
from apportion.simulator.schedule import FORWARD, Action, actions_of, merge
from apportion.simulator.strategy_tree import Schedule

MB = 1e6
PARTS = ("embed", "layer", "head")


@dataclass(frozen=True)
class Part:
    """One layer, or what stands before or behind them, of one micro-batch on one device. Seconds, and bytes.

    activation_bytes stay for the backward pass; working_bytes are there for a moment, at the turn from forward to backward. exposed: of
    forward and backward together, in which the device communicates and computes nothing. source: where the costs came from.
    """

    forward: float
    backward: float
    activation_bytes: float
    weight_bytes: float
    grad_bytes: float
    state_bytes: float
    update: float
    working_bytes: float
    spread: float
    exposed: float
    source: str


def two_layers(workload: Workload, plan: Plan, cluster: Cluster) -> ExecutionGraph:
    """One micro-batch of one replica through two layers. Error: Unsupported for ZeRO-3."""
    if plan.zero == 3:
        raise Unsupported("stages as wholes do not know ZeRO-3, which fetches weights inside a stage: simulate it in full")
    alone = replace(plan, pp=1, dp=1, chunks=1, num_micro_batches=1, zero=0)
    net = workload.model(plan.micro_batch(workload.batch), 2)
    return compile(net, strategy(net, 2, alone, cluster), cluster)


def parts_of(graph: ExecutionGraph, model: CostModel, behaviour: Behaviour) -> dict[str, Part]:
    """Embedding, layer and head, from two layers on the tensor-parallel devices of one replica."""
    costs = model.costs(graph)
    timeline = execute(graph, costs, model.topology.capacity, behaviour)
    device = model.topology.cluster.nodes[0][0]
    forward, backward = (
        _starts(graph, timeline.start, device, ("forward",)),
        _starts(graph, timeline.start, device, ("recompute", "backward")),
    )
    end_forward = max(timeline.end[t.id] for t in graph.tasks if t.phase == "forward" and device in t.devices)
    end_backward = max(timeline.end[t.id] for t in graph.tasks if t.phase in ("backward", "recompute") and device in t.devices)
    layer, layer_back = forward["layers.1"] - forward["layers.0"], backward["layers.0"] - backward["layers.1"]
    times = {
        "embed": (forward["layers.0"], end_backward - backward["layers.0"] - layer_back),
        "layer": (layer, layer_back),
        "head": (end_forward - forward["layers.0"] - 2 * layer, backward["layers.1"] - end_forward),
    }
    held = _held(graph, timeline.end, device)
    weights, grads, states, updates = _weights(graph, costs, device)
    memory = memory_of(graph, timeline, Overheads.none())[device]
    standing = sum(memory.categories[kind] for kind in ("weight", "state", "grad", "input"))
    working = {"head": max(0.0, memory.peak - standing - sum(held.values()))}
    windows = {
        "embed": ((0.0, forward["layers.0"]), (backward["layers.0"] + layer_back, end_backward)),
        "layer": ((forward["layers.0"], forward["layers.1"]), (backward["layers.1"], backward["layers.0"])),
        "head": ((forward["layers.1"] + layer, backward["layers.1"]),),
    }
    busy = [(timeline.start[t.id], timeline.end[t.id]) for t in graph.tasks if t.stream == COMPUTE and device in t.devices]
    exposed = {name: sum(_free(busy, *window) for window in mine) for name, mine in windows.items()}
    spread, source = _origin(costs)
    found = {}
    for name, (ahead, back) in times.items():
        found[name] = Part(
            max(0.0, ahead), max(0.0, back), held[name], weights[name], grads[name], states[name], updates[name],
            working.get(name, 0.0), spread, exposed[name], source,
        )  # fmt: skip
    return found


def _free(busy: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """Seconds of a window in which nothing is computed; compute tasks of one device never overlap."""
    return max(0.0, high - low - sum(max(0.0, min(end, high) - max(start, low)) for start, end in busy))


def _origin(costs: Sequence[Cost]) -> tuple[float, str]:
    """The mean spread, by time, and the sources that make up nine tenths of it."""
    total = sum(c.total for c in costs) or 1.0
    sums: dict[str, float] = defaultdict(float)
    for c in costs:
        sums[c.source] += c.total / total
    named: dict[str, float] = {}
    for source, share in sorted(sums.items(), key=lambda item: -item[1]):
        if sum(named.values()) < 0.9:
            named[source] = share
    words = " + ".join(f"{share:.0%} {source}" for source, share in named.items())
    return sum(c.total * c.spread for c in costs) / total, f"layers of {words}"


def _part(name: str) -> str:
    path = name.removeprefix("grad:").removeprefix("optimizer.")
    if path.startswith("layers."):
        return "layer" if path.startswith("layers.1") else ""  # the second layer stands for all
    return "embed" if path.startswith("embed") else "head"


def _starts(graph: ExecutionGraph, start: Sequence[float], device: str, phases: tuple[str, ...]) -> dict[str, float]:
    """layers.0, layers.1 -> when their first task starts."""
    found: dict[str, float] = {}
    for task in graph.tasks:
        path = task.name.removeprefix("grad:")
        if task.phase in phases and task.op and device in task.devices and path.startswith("layers."):
            key = ".".join(path.split(".")[:2])
            found[key] = min(found.get(key, float("inf")), start[task.id])
    return found


def _held(graph: ExecutionGraph, end: Sequence[float], device: str) -> dict[str, float]:
    """Bytes that a forward pass leaves for the backward."""
    held: dict[str, float] = dict.fromkeys((*PARTS, ""), 0.0)
    later = {t.id for t in graph.tasks if t.phase != "forward"}
    for buffer in graph.buffers:
        made = graph.writers.get(buffer.id)
        forward = made and not any(t in later for t in made)
        if buffer.device == device and forward and any(t in later for t in graph.readers.get(buffer.id, ())):
            held[_part(buffer.tensor)] += buffer.num_bytes
    return held


def _weights(graph: ExecutionGraph, costs: Sequence[Cost], device: str) -> list[dict[str, float]]:
    """Bytes of weights, gradients and states, and seconds of the update, per part."""
    found: list[dict[str, float]] = [dict.fromkeys((*PARTS, ""), 0.0) for _ in range(4)]
    for buffer in graph.buffers:
        if buffer.device == device and buffer.kind in ("weight", "state") and not graph.writers.get(buffer.id):
            found[0 if buffer.kind == "weight" else 2][_part(buffer.tensor)] += buffer.num_bytes
    for name, views in graph.results.items():
        for view in {v for v, _ in views if name.startswith("grad:")}:
            if graph.buffers[view.buffer].device == device:
                found[1][_part(name)] += graph.buffers[view.buffer].num_bytes
    for task in graph.tasks:
        if task.phase == "optimizer" and task.devices == (device,):
            found[3][_part(task.name)] += costs[task.id].total
    return found


def bundle(costs: Sequence[Cost], capacity: Sequence[float]) -> Cost:
    """Equal communications that start together, as one: it loads all their links, and is as fast as the fullest allows."""
    links: dict[int, float] = defaultdict(float)
    for cost in costs:
        for link, times in cost.links.items():
            links[link] += times
    rate = min([costs[0].rate, *(capacity[link] / times for link, times in links.items())])
    return replace(costs[0], rate=rate, links=dict(links))


@dataclass
class _Writer:
    """Appends tasks, their costs and the buffers they hold."""

    graph: ExecutionGraph
    costs: list[Cost]

    def add(
        self, name: str, cost: Cost, devices: tuple[str, ...], stream: str, action: Action, after: Sequence[int],
        reads: Sequence[int] = (), writes: Sequence[int] = (),
    ) -> int:  # fmt: skip
        id = len(self.graph.tasks)
        kind = COMPUTE if stream == COMPUTE else "p2p" if stream == "feature" else "all_reduce"
        views = [tuple(View(b, self.graph.buffers[b].box) for b in side) for side in (reads, writes)]
        self.graph.tasks.append(
            Task(id, kind, name, devices, stream, action.phase, action.stage, action.micro_batch, (Piece(*views),), tuple(after))
        )
        self.costs.append(cost)
        return id

    def hold(self, tensor: str, device: str, num_bytes: float, kind: str) -> int:
        self.graph.buffers.append(Buffer(len(self.graph.buffers), tensor, device, ((0, round(num_bytes)),), 1, kind))
        return len(self.graph.buffers) - 1


class _Pipeline:
    def __init__(self, workload: Workload, plan: Plan, model: CostModel, parts: dict[str, Part]) -> None:
        self.plan, self.model, self.workload = plan, model, workload
        num_layers, stages = workload.spec.num_layers, plan.pp * plan.chunks
        if num_layers % stages:
            raise InvalidParameter(f"{num_layers} layers cannot be cut into {stages} equal pipeline stages")
        self.parts = parts
        self.layers = num_layers // stages
        self.num_stages = stages
        self.mesh: DeviceMesh = model.topology.cluster.mesh(pp=plan.pp, dp=plan.dp, tp=plan.tp)
        self.slices = [self.mesh.select(pp=rank) for rank in range(plan.pp)]
        self.graph = ExecutionGraph(f"{workload.spec.architecture} in stages")
        self.out = _Writer(self.graph, [])
        self.done: dict[Action, int] = {}
        self.kept: dict[tuple[int, int], int] = {}
        self.gradients: dict[int, list[int]] = defaultdict(list)

    def rank(self, stage: int) -> int:
        return stage % self.plan.pp

    def device(self, stage: int) -> str:
        return self.slices[self.rank(stage)].devices[0]

    def contents(self, stage: int) -> list[tuple[str, int]]:
        """(part, how many) in model order."""
        whole = [("embed", int(stage == 0)), ("layer", self.layers), ("head", int(stage == self.num_stages - 1))]
        return [(name, count) for name, count in whole if count]

    def total(self, stage: int, attribute: str) -> float:
        return sum(count * float(getattr(self.parts[name], attribute)) for name, count in self.contents(stage))

    def cost(self, seconds: float) -> Cost:
        return Cost(seconds, source=self.parts["layer"].source, spread=self.parts["layer"].spread)

    def run(self) -> tuple[ExecutionGraph, list[Cost]]:
        plan = self.plan
        order = Schedule(plan.num_micro_batches, "interleaved" if plan.chunks > 1 else plan.schedule)
        ranks = [actions_of(r, range(r, self.num_stages, plan.pp), plan.pp, order) for r in range(plan.pp)]
        for stage in range(self.num_stages):
            self._static(stage)
        for action in merge(ranks, self._needs):
            (self._forward if action.phase == FORWARD else self._backward)(action)
        inner: dict[str, float] = defaultdict(float)
        for stage in range(self.num_stages):
            self._update(stage)
            inner[self.device(stage)] += plan.num_micro_batches * self.total(stage, "exposed")
        self.graph.inner_communication = dict(inner)
        self.graph.group_sizes = dict.fromkeys(inner, max(plan.tp, plan.dp))
        return self.graph, self.out.costs

    def _needs(self, action: Action) -> list[Action]:
        if action.phase == FORWARD:
            return [Action(FORWARD, action.stage - 1, action.micro_batch)] if action.stage else []
        later = action.stage < self.num_stages - 1
        return [Action(FORWARD, action.stage, action.micro_batch)] + (
            [Action(action.phase, action.stage + 1, action.micro_batch)] if later else []
        )

    def _static(self, stage: int) -> None:
        shards = {"weight": 1, "state": self.plan.dp if self.plan.zero else 1, "grad": self.plan.dp if self.plan.zero >= 2 else 1}
        for kind, shard in shards.items():
            name = "weight" if kind == "grad" else kind  # gradients of a pipeline stay from step to step, as its contiguous buffers do
            self.out.hold(f"{kind} of stage {stage}", self.device(stage), self.total(stage, f"{kind}_bytes") / shard, name)

    def _forward(self, action: Action) -> None:
        stage, m = action.stage, action.micro_batch
        before = [self.done[n] for n in self._needs(action)]
        held = self.out.hold(f"activations of stage {stage}", self.device(stage), self.total(stage, "activation_bytes"), "activation")
        self.kept[stage, m] = held
        task = self.out.add(
            "forward", self.cost(self.total(stage, "forward")), (self.device(stage),), COMPUTE, action, before, writes=[held]
        )  # fmt: skip
        self.done[action] = self._message(action, task, stage + 1) if stage < self.num_stages - 1 else task

    def _backward(self, action: Action) -> None:
        stage, m, device = action.stage, action.micro_batch, self.device(action.stage)
        working = [self.out.hold("at the turn", device, self.total(stage, "working_bytes"), "partial")]
        before = [self.done[n] for n in self._needs(action) if n.stage != stage or n.phase != FORWARD]
        reduces = m == self.plan.num_micro_batches - 1 or self.plan.zero >= 2
        if not reduces or not self.plan.overlap_gradients or self.plan.dp == 1:
            cost = self.cost(self.total(stage, "backward"))
            task = self.out.add("backward", cost, (device,), COMPUTE, action, before, [self.kept[stage, m]], working)
            if reduces:
                self._reduce(stage, self.total(stage, "grad_bytes"), task, action)
        else:
            task = self._reducing_backward(action, before, working)
        self.done[action] = self._message(action, task, stage - 1) if stage else task

    def _reducing_backward(self, action: Action, before: list[int], working: list[int]) -> int:
        """Part by part, its gradients on the way as soon as a bucket is full."""
        stage, waiting, cap = action.stage, 0.0, 1.0
        held, task = self.kept[stage, action.micro_batch], -1
        for name, count in reversed(self.contents(stage)):
            for _ in range(count):
                part = self.parts[name]
                cost = self.cost(part.backward)
                task = self.out.add("backward", cost, (self.device(stage),), COMPUTE, action, before, [held], working)
                before, working, waiting = [task], [], waiting + part.grad_bytes
                if waiting > cap * MB:
                    self._reduce(stage, waiting, task, action)
                    waiting, cap = 0.0, self.plan.bucket_mb
        if waiting:
            self._reduce(stage, waiting, task, action)
        return task

    def _reduce(self, stage: int, num_bytes: float, task: int, action: Action) -> None:
        if self.plan.dp > 1:
            kind = "reduce_scatter" if self.plan.zero >= 2 else "all_reduce"
            name = "gradients"
            self.gradients[stage].append(
                self.out.add(name, self._collective(stage, kind, num_bytes), (self.device(stage),), "gradient", action, [task])
            )

    def _collective(self, stage: int, kind: str, num_bytes: float) -> Cost:
        """Of all data-parallel groups of the stage at once."""
        slice_ = self.slices[self.rank(stage)]
        groups = [slice_.select(tp=i).devices for i in range(self.plan.tp)]
        costs = [self.model.collectives.cost(self.model.topology, kind, group, num_bytes) for group in groups]
        return bundle(costs, self.model.topology.capacity)

    def _message(self, action: Action, task: int, to: int) -> int:
        """To the same place in the next slice, from every device of this one."""
        here, there = self.slices[self.rank(action.stage)], self.slices[self.rank(to)]
        if here == there:
            return task
        spec, plan = self.workload.spec, self.plan
        size = plan.micro_batch(self.workload.batch) * self.workload.seq_len * spec.hidden * ITEMSIZE[spec.dtype]
        if plan.split_sends or plan.sequence_parallel:
            size //= plan.tp
        pairs = zip(here.devices, there.devices, strict=True)
        costs = [self.model.collectives.cost(self.model.topology, "p2p", pair, size) for pair in pairs]
        cost = bundle(costs, self.model.topology.capacity)
        return self.out.add("message", cost, (here.devices[0], there.devices[0]), "feature", action, [task])

    def _update(self, stage: int) -> None:
        action = Action("optimizer", stage, 0)
        last = self.done[Action("backward", stage, self.plan.num_micro_batches - 1)]
        before = self.gradients[stage] or [last]
        seconds = self.total(stage, "update") / (self.plan.dp if self.plan.zero else 1)
        task = self.out.add("update", self.cost(seconds), (self.device(stage),), COMPUTE, action, before)
        if self.plan.zero and self.plan.dp > 1:
            cost = self._collective(stage, "all_gather", self.total(stage, "weight_bytes"))
            self.out.add("weights", cost, (self.device(stage),), "gradient", action, [task])


def coarse(
    workload: Workload, plan: Plan, model: CostModel, behaviour: Behaviour | None = None, layers: ExecutionGraph | None = None
) -> tuple[ExecutionGraph, list[Cost]]:
    """The graph of stages and the costs of its tasks. layers: what `two_layers` made, where it is there already.

    Errors: InvalidParameter for a plan that the cluster or the layers do not allow; Unsupported for ZeRO-3.
    """
    layers = layers or two_layers(workload, plan, model.topology.cluster)
    return _Pipeline(workload, plan, model, parts_of(layers, model, behaviour or Behaviour())).run()
