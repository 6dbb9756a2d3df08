"""The hierarchical topology-aware executor (Proteus, section 6): runs an execution graph in simulated time, by events.

A task starts when it heads its queue on every device that takes part (rendezvous) and what it waits for has ended. Progress is fluid: a
compute task and a communication that overlap slow each other down, communications that share directed links share their bandwidth max-min
fairly, and both are worked out anew at every start and end. Knows tasks and their costs; nothing of models, or where costs come from.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from apportion.core.errors import InternalError, InvalidParameter
from apportion.simulator.execution_graph import COMPUTE, ExecutionGraph, Task
from apportion.simulator.fair_share import fair_share

OVERLAPS = ("fluid", "whole_op", "none")
SAME_TIME = 1e-12  # seconds: events this close are one


@dataclass(frozen=True)
class Cost:
    """What a task takes alone. seconds: of computing, or of a communication before its first byte moves (latency).

    wire_bytes at `rate` bytes/s follow, over links: number -> how often each byte crosses it. source: where the number comes from.
    spread: relative standard deviation of the total.
    """

    seconds: float
    wire_bytes: float = 0.0
    rate: float = 1.0
    links: Mapping[int, float] = field(default_factory=dict)
    source: str = "given"
    spread: float = 0.0

    @property
    def total(self) -> float:
        return self.seconds + self.wire_bytes / self.rate


@dataclass(frozen=True)
class Behaviour:
    """How tasks disturb one another. gamma: stream -> (slow-down of compute, of the communication) while both run on a device.

    overlap: 'fluid' slows the time they really share; 'whole_op' is the paper's rule (the whole of either, however short the overlap);
    'none' ignores it. share: communications on one link share it; False is the paper's ablation. launch_s: between two compute tasks of a
    device. blocking: streams whose communications hold up the device's computing as well (a host that waits for them).
    """

    gamma: Mapping[str, tuple[float, float]] = field(default_factory=lambda: {"gradient": (0.3, 0.3)})
    overlap: str = "fluid"
    share: bool = True
    launch_s: float = 0.0
    blocking: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise InvalidParameter(f"unknown overlap rule {self.overlap!r}; known: {', '.join(OVERLAPS)}")
        if self.launch_s < 0 or any(g < 0 for pair in self.gamma.values() for g in pair):
            raise InvalidParameter("launch_s and gamma are slow-downs: they cannot be negative")


@dataclass(frozen=True)
class Timeline:
    """start, end: seconds of each task."""

    start: Sequence[float]
    end: Sequence[float]

    @property
    def seconds(self) -> float:
        return max(self.end, default=0.0)


def execute(graph: ExecutionGraph, costs: Sequence[Cost], capacity: Sequence[float] = (), behaviour: Behaviour | None = None) -> Timeline:
    """When each task runs. costs: per task; capacity: bytes/s of each directed link.

    Error: InvalidParameter where tasks wait for one another, naming both devices.
    """
    if len(costs) != len(graph.tasks):
        raise InvalidParameter(f"{len(costs)} costs for {len(graph.tasks)} tasks")
    run = _Run(graph, costs, capacity, behaviour or Behaviour())
    run.loop()
    return Timeline(run.start, run.end)


def queues_of(task: Task, blocking: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The queues a task stands in. Messages of one pair have a channel of their own, so that sends and receives do not wait for each other;
    host memory is no queue."""
    if task.kind == COMPUTE or task.stream == COMPUTE or task.stream in blocking:
        return [(COMPUTE, device) for device in task.devices]
    if task.stream in ("h2d", "d2h"):
        return [(task.stream, device) for device in task.devices if not device.startswith("cpu")] or [(task.stream, task.devices[0])]
    if task.kind == "p2p":
        return [(task.stream, *task.devices)]
    return [(task.stream, device) for device in task.devices]


class _Run:
    """The state of one execution. A task is described by lists that its id indexes."""

    def __init__(self, graph: ExecutionGraph, costs: Sequence[Cost], capacity: Sequence[float], behaviour: Behaviour) -> None:
        self.graph, self.costs, self.capacity, self.behaviour = graph, costs, capacity, behaviour
        n = len(graph.tasks)
        self.start, self.end = [0.0] * n, [0.0] * n
        self.waiting = [len(before) for before in graph.predecessors]
        self.followers: list[list[int]] = [[] for _ in range(n)]
        for follower, before in enumerate(graph.predecessors):
            for p in before:
                self.followers[p].append(follower)
        self.queues: list[list[int]] = []
        self.queue_of: list[list[int]] = []
        numbers: dict[tuple[str, ...], int] = {}
        self.device_of: list[list[int]] = []
        devices: dict[str, int] = {}
        for task in graph.tasks:
            mine = [numbers.setdefault(key, len(numbers)) for key in queues_of(task, behaviour.blocking)]
            while len(self.queues) < len(numbers):
                self.queues.append([])
            for queue in mine:
                self.queues[queue].append(task.id)
            self.queue_of.append(mine)
            self.device_of.append([devices.setdefault(device, len(devices)) for device in task.devices])
        self.head = [0] * len(self.queues)
        self.computes = [task.kind == COMPUTE or task.stream == COMPUTE for task in graph.tasks]
        self.gamma = [behaviour.gamma.get(task.stream, (0.0, 0.0)) for task in graph.tasks]
        # what runs now
        self.computing: list[int | None] = [None] * len(devices)
        self.communicating: list[dict[int, None]] = [{} for _ in devices]
        self.left = [0.0] * n  # seconds, or bytes of a transfer
        self.speed = [0.0] * n
        self.since = [0.0] * n
        self.version = [0] * n
        self.transferring: dict[int, None] = {}
        self.on_link: dict[int, dict[int, None]] = defaultdict(dict)
        self.bandwidth: dict[int, float] = {}
        self.slowed: set[int] = set()  # by the whole-op rule
        self.events: list[tuple[float, int, int]] = []
        self.dirty: dict[int, None] = {}  # running tasks whose speed may have changed
        self.now = 0.0

    def loop(self) -> None:
        done = 0
        self._start_ready(range(len(self.graph.tasks)))
        self._settle()
        while self.events:
            self.now = self.events[0][0]
            ended: list[int] = []
            while self.events and self.events[0][0] <= self.now + SAME_TIME:
                _, task, version = heapq.heappop(self.events)
                if version != self.version[task]:
                    continue
                if task not in self.transferring and self.costs[task].wire_bytes > 0 and not self.computes[task]:
                    self._begin_transfer(task)
                else:
                    ended.append(task)
            for task in ended:
                self._finish(task)
            done += len(ended)
            self._start_ready([t for task in ended for t in self._unblocked(task)])
            self._settle()
        if done < len(self.graph.tasks):
            raise InvalidParameter(self._deadlock())

    # -- starts and ends

    def _unblocked(self, task: int) -> list[int]:
        heads = [self.queues[q][self.head[q]] for q in self.queue_of[task] if self.head[q] < len(self.queues[q])]
        return [*self.followers[task], *heads]

    def _start_ready(self, candidates: Sequence[int] | range) -> None:
        for task in candidates:
            if self.waiting[task] or self.version[task]:
                continue
            if all(self.queues[q][self.head[q]] == task for q in self.queue_of[task]):
                self._begin(task)

    def _begin(self, task: int) -> None:
        self.start[task] = self.since[task] = self.now
        self.left[task] = self.costs[task].seconds
        self.version[task] = 1
        self.dirty[task] = None
        if self.computes[task]:
            self.left[task] += self.behaviour.launch_s
            for device in self.device_of[task]:
                self.computing[device] = task
        else:
            for device in self.device_of[task]:
                self.communicating[device][task] = None
        if self.behaviour.overlap == "whole_op":
            self._slow_whole(task)
        self._disturb(task)

    def _finish(self, task: int) -> None:
        self.end[task] = self.now
        self.version[task] += 1
        self.dirty.pop(task, None)
        for queue in self.queue_of[task]:
            self.head[queue] += 1
        if self.computes[task]:
            for device in self.device_of[task]:
                self.computing[device] = None
        else:
            for device in self.device_of[task]:
                self.communicating[device].pop(task)
        if task in self.transferring:
            del self.transferring[task]
            del self.bandwidth[task]
            self._reshare(task)
            for link in self.costs[task].links:
                self.on_link[link].pop(task, None)
        self._disturb(task)
        for follower in self.followers[task]:
            self.waiting[follower] -= 1

    def _begin_transfer(self, task: int) -> None:
        self.transferring[task] = None
        self.left[task], self.speed[task], self.since[task] = self.costs[task].wire_bytes, 0.0, self.now
        self.bandwidth[task] = self.costs[task].rate
        for link in self.costs[task].links:
            self.on_link[link][task] = None
        self.dirty[task] = None
        self._reshare(task)

    # -- speeds

    def _disturb(self, task: int) -> None:
        """Whoever runs beside a task that starts or ends may change speed."""
        if self.behaviour.overlap != "fluid":
            return
        for device in self.device_of[task]:
            if self.computes[task]:
                self.dirty.update(dict.fromkeys(t for t in self.communicating[device] if self.gamma[t][1]))
            elif self.gamma[task][0] and (other := self.computing[device]) is not None:
                self.dirty[other] = None

    def _reshare(self, task: int) -> None:
        """New bandwidths for all flows that are connected to this one through links."""
        if not self.behaviour.share:
            return
        group, frontier, seen = {task: None}, [task], set()
        while frontier:
            for link in self.costs[frontier.pop()].links:
                if link not in seen:
                    seen.add(link)
                    fresh = [t for t in self.on_link[link] if t not in group]
                    group.update(dict.fromkeys(fresh))
                    frontier += fresh
        flows = [t for t in group if t in self.transferring]
        shares = fair_share([(self.costs[t].rate, self.costs[t].links) for t in flows], self.capacity)
        for t, share in zip(flows, shares, strict=True):
            if share != self.bandwidth[t]:
                self.bandwidth[t] = share
                self.dirty[t] = None

    def _slow_whole(self, task: int) -> None:
        """The paper's rule: a compute task that meets a communication is slower for all its length, and so is the communication."""
        for device in self.device_of[task]:
            met = [*self.communicating[device]] if self.computes[task] else [task]
            compute = self.computing[device]
            if compute is None:
                continue
            for communication in met:
                for t, g in ((compute, self.gamma[communication][0]), (communication, self.gamma[communication][1])):
                    if t not in self.slowed and g:
                        self.slowed.add(t)
                        self.dirty[t] = None
                        if self.computes[t]:
                            self._advance(t)
                            self.left[t] += g * (self.costs[t].seconds + self.behaviour.launch_s)

    def _settle(self) -> None:
        """Give every running task that was disturbed its new speed and end."""
        for task in self.dirty:
            speed = self._speed(task)
            if speed == self.speed[task] and self.version[task] > 1:
                if self.behaviour.overlap != "whole_op":
                    continue
            self._advance(task)
            self.speed[task] = speed
            self.version[task] += 1
            heapq.heappush(self.events, (self.now + self.left[task] / speed, task, self.version[task]))
        self.dirty.clear()

    def _advance(self, task: int) -> None:
        self.left[task] = max(0.0, self.left[task] - (self.now - self.since[task]) * self.speed[task])
        self.since[task] = self.now

    def _speed(self, task: int) -> float:
        base = self.bandwidth[task] if task in self.transferring else 1.0
        if self.behaviour.overlap == "none":
            return base
        if self.behaviour.overlap == "whole_op":
            return base / (1 + self.gamma[task][1]) if task in self.slowed and not self.computes[task] else base
        if self.computes[task]:
            streams = {self.graph.tasks[t].stream: self.gamma[t][0] for d in self.device_of[task] for t in self.communicating[d]}
            return base / (1 + sum(streams.values()))
        slow = self.gamma[task][1]
        return base / (1 + slow) if slow and any(self.computing[d] is not None for d in self.device_of[task]) else base

    # -- what cannot go on

    def _deadlock(self) -> str:
        tasks = self.graph.tasks
        for queue, head in zip(self.queues, self.head, strict=True):
            if head == len(queue) or self.waiting[queue[head]]:
                continue
            task = tasks[queue[head]]
            for q, key in zip(self.queue_of[task.id], queues_of(task, self.behaviour.blocking), strict=True):
                ahead = tasks[self.queues[q][self.head[q]]]
                if ahead.id != task.id:
                    here = next(d for d in task.devices if d != key[-1])
                    others = [d for d in ahead.devices if d != key[-1]] or [key[-1]]
                    return (
                        f"deadlock: {here} waits in {task.kind} {task.name!r} for {key[-1]}, which is at {ahead.kind} {ahead.name!r}"
                        f" and waits for {here if here in others else others[0]}"
                    )
        stuck = next((queue[head] for queue, head in zip(self.queues, self.head, strict=True) if head < len(queue)), None)
        if stuck is None:
            raise InternalError("tasks are left, and no queue holds one")
        before = next(p for p in self.graph.predecessors[stuck] if not self.end[p] and not self._ended(p))
        a, b = tasks[stuck], tasks[before]
        return f"deadlock: {a.devices[0]} waits at {a.name!r} for {b.devices[0]}, whose {b.name!r} cannot start before it"

    def _ended(self, task: int) -> bool:
        return all(task in self.queues[q][: self.head[q]] for q in self.queue_of[task])
