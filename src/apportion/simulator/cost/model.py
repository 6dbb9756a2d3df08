"""The cost of every task of a graph, from the first provider that knows it: measured table, interpolation, roofline.

A provider takes (work, device) and answers a Cost or None; the chain ends in an error, never in a silent guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from apportion.core.errors import Unsupported
from apportion.simulator.cost.collective import Nccl
from apportion.simulator.cost.work import Work, work_of
from apportion.simulator.execution_graph import COMPUTE, ExecutionGraph, Task
from apportion.simulator.htae import Cost
from apportion.simulator.topology import Device, Topology

US = 1e-6
TILE = 128


class Provider(Protocol):
    def cost(self, work: Work, device: Device) -> Cost | None:
        """Seconds of the work alone on the device, or None where this provider does not know."""


class Collectives(Protocol):
    def cost(self, topology: Topology, kind: str, devices: Sequence[str], num_bytes: float) -> Cost:
        """Of a message, counted as `layout.Transfer.volume` does."""


@dataclass(frozen=True)
class Roofline:
    """max(operations / peak, bytes / bandwidth), each derated, plus a constant per task. What calibration fits.

    matmul, attention: share of the dense peak that long products reach; memory: of the bandwidth; tail: whether products are counted in
    whole waves of tiles over the device's SMs. overhead_s: per task. half_rows: rows of a product at which half of `matmul` is reached.
    """

    matmul: float = 0.70
    attention: float = 0.45
    memory: float = 0.80
    overhead_s: float = 4 * US
    half_rows: float = 0.0
    tail: bool = True
    spread: float = 0.20
    source: str = "roofline"

    def cost(self, work: Work, device: Device) -> Cost | None:
        moving = work.num_bytes / (device.mem_bandwidth * self.memory)
        if work.kind == "fused":
            return Cost(moving, source=self.source, spread=self.spread)
        if work.kind == "stream":
            return Cost(max(moving, 0.0) + self.overhead_s, source=self.source, spread=self.spread)
        peak = device.flops.get(work.dtype)
        if peak is None:
            return None
        if work.kind == "attention":
            computing = work.flops / (peak * self.attention)
        else:
            rows = min(work.m, work.n)
            computing = work.flops * (self._waves(work, device) if self.tail else 1.0) / (peak * self.matmul) * (1 + self.half_rows / rows)
        return Cost(max(computing, moving) + self.overhead_s, source=self.source, spread=self.spread)

    @staticmethod
    def _waves(work: Work, device: Device) -> float:
        """Tiles in whole waves over tiles; a product of fewer tiles than SMs is cut along k instead."""
        tiles = work.batch * math.ceil(work.m / TILE) * math.ceil(work.n / TILE)
        return 1.0 if tiles < device.num_sms else math.ceil(tiles / device.num_sms) * device.num_sms / tiles


@dataclass
class CostModel:
    """providers: asked in order. collectives: of the cluster's library."""

    topology: Topology
    providers: Sequence[Provider] = (Roofline(),)
    collectives: Collectives = field(default_factory=Nccl)
    known: dict[tuple[Work, str], Cost] = field(default_factory=dict)
    messages: dict[tuple[str, tuple[str, ...], int], Cost] = field(default_factory=dict)

    def costs(self, graph: ExecutionGraph) -> list[Cost]:
        """Of every task. Error: Unsupported, naming the operator, for one that no provider knows."""
        return [self.task(graph, task) for task in graph.tasks]

    def task(self, graph: ExecutionGraph, task: Task) -> Cost:
        if task.kind == COMPUTE or task.stream == COMPUTE:
            return self.compute(work_of(graph, task), task.devices[0], task.name)
        key = (task.kind, task.devices, task.num_bytes)
        if key not in self.messages:
            self.messages[key] = self.collectives.cost(self.topology, task.kind, task.devices, task.num_bytes)
        return self.messages[key]

    def compute(self, work: Work, device: str, name: str) -> Cost:
        kind = self.topology.kinds.get(device)
        if kind is None:  # an optimizer on the host: its memory bandwidth bounds it
            return Cost(work.num_bytes / HOST_BANDWIDTH, source="host memory", spread=0.3)
        if (work, kind.name) not in self.known:
            found = next((cost for provider in self.providers if (cost := provider.cost(work, kind)) is not None), None)
            if found is None:
                raise Unsupported(f"the cost of {name!r} is not supported: {kind.name} has no numbers for {work.kind} in {work.dtype}")
            self.known[work, kind.name] = found
        return self.known[work, kind.name]

    def with_providers(self, *providers: Provider) -> CostModel:
        return replace(self, providers=providers, known={})


HOST_BANDWIDTH = 20e9  # bytes/s of an optimizer on a host CPU
