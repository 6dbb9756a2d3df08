"""What the host of `two_ranks` adds to a graph, as tasks: packing a message and handing it over, and unpacking it when somebody needs it.

The host of a rank walks its tasks in program order with one thread. A message leaves when the walk comes to it; the walk stops where a task
needs a message that has not arrived (at once, where the run is said not to overlap). So do the queues of this graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from apportion.simulator.execution_graph import COMPUTE, ExecutionGraph, Task
from apportion.simulator.layout import volume


def walked(graph: ExecutionGraph, overlap: bool) -> ExecutionGraph:
    """The graph with a task 'pack' and a task 'unpack' on each device around every communication; num_bytes: what they copy."""
    walk = _Walk(graph)
    for task in graph.tasks:
        walk.step(task, overlap)
    for device, pending in walk.pending.items():
        for message in list(pending):
            walk.unpack(device, message)
    return replace(graph, tasks=walk.tasks)


class _Walk:
    def __init__(self, graph: ExecutionGraph) -> None:
        self.graph = graph
        self.tasks: list[Task] = []
        self.number: dict[int, int] = {}  # of a task here, by its number in the graph
        self.pending: dict[str, dict[int, Task]] = defaultdict(dict)  # device -> messages under way

    def step(self, task: Task, overlap: bool) -> None:
        for device in task.devices:
            for message in self.graph.predecessors[task.id] & self.pending[device].keys():
                self.unpack(device, message)
        computes = task.kind == COMPUTE or task.stream == COMPUTE
        packed = [] if computes else [self._host("pack", device, task, ()) for device in task.devices]
        self.number[task.id] = self._emit(task, [self.number[p] for p in task.after] + packed)
        for device in () if computes else task.devices:
            self.pending[device][task.id] = task
            if not overlap:
                self.unpack(device, task.id)

    def unpack(self, device: str, message: int) -> None:
        self._host("unpack", device, self.pending[device].pop(message), (self.number[message],))

    def _emit(self, task: Task, after: Iterable[int]) -> int:
        self.tasks.append(replace(task, id=len(self.tasks), after=tuple(sorted(set(after)))))
        return self.tasks[-1].id

    def _host(self, kind: str, device: str, of: Task, after: Iterable[int]) -> int:
        """As `two_ranks` does it: what leaves is made one piece, what comes is used where it lies, except the parts of an all-gather."""
        views = of.reads if kind == "pack" else of.writes if of.kind == "all_gather" else []
        mine = [(v, self.graph.buffers[v.buffer]) for v in views if self.graph.buffers[v.buffer].device == device]
        size = sum(volume(view.box) * buffer.itemsize for view, buffer in mine)
        return self._emit(replace(of, kind=kind, devices=(device,), stream=COMPUTE, pieces=(), num_bytes=size), after)
