"""Providers that read measured tables: of operators (before the roofline in the chain) and of collectives (before NCCL's own model).

Every cost says which table it is from and how it was read; a point outside what was measured says 'extrapolated'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from apportion.simulator.cost.collective import Nccl
from apportion.simulator.cost.table import Table, shipped
from apportion.simulator.cost.work import Work
from apportion.simulator.htae import Cost
from apportion.simulator.ops import ITEMSIZE
from apportion.simulator.topology import Device, Topology

SAME_SPEED = {"float16": "bfloat16"}  # one tensor core, one rate
OPS = {"gemm": "gemm", "attention": "prefill_attention"}  # kind of work -> op of a table
US = 1e-6
BACKWARD_SPREAD = 0.15  # of an attention's backward pass, scaled from its forward by its operations


@dataclass(frozen=True)
class Measured:
    """Times of products and attention from tables of the very device. overhead_s: per operator, what kernels wait for their launch."""

    tables: Sequence[Table] = field(default_factory=shipped)
    overhead_s: float = 0.0

    def cost(self, work: Work, device: Device) -> Cost | None:
        dtype = SAME_SPEED.get(work.dtype, work.dtype)
        if work.kind not in OPS:
            return None
        op, points = OPS[work.kind], _product(work) if work.kind == "gemm" else _attention(work)
        for table in self.tables:
            if (table.device, table.op, table.dtype) != (device.name, op, dtype):
                continue
            for i, point in enumerate(points):
                reading = table.read(point, lambda at: best_seconds(op, dtype, at, device))
                if reading is not None and (reading.how != "extrapolated" or i == len(points) - 1):
                    times, spread = (_of_forward(work), BACKWARD_SPREAD) if work.kind == "attention" else (1.0, 0.0)
                    spread = reading.spread if times == 1 else max(spread, reading.spread)
                    return Cost(reading.seconds * times + self.overhead_s, source=f"{reading.how}: {table.source}", spread=spread)
        return None


def _product(work: Work) -> list[dict[str, float]]:
    """The product itself, and its transpose, which is as much work: the one that was measured is taken."""
    if work.batch > 1:
        return []
    return [{"m": work.m, "n": work.n, "k": work.k}, {"m": work.n, "n": work.m, "k": work.k}, {"m": work.m, "n": work.n, "k": work.k}]


def _attention(work: Work) -> list[dict[str, float]]:
    return [{"head_dim": work.k, "s": work.n, "sequences": work.batch, "heads": max(1.0, work.m / work.n)}]


def _of_forward(work: Work) -> float:
    """Operations over those of the forward pass, causal."""
    return work.flops / (2.0 * work.batch * work.m * work.n * work.k)


def best_seconds(op: str, dtype: str, at: Mapping[str, float], device: Device) -> float:
    """Of a point of a table of this op: the larger of operations at the dense peak and bytes at full bandwidth, and a microsecond."""
    size = ITEMSIZE[dtype] if dtype in ITEMSIZE else 2
    peak, bandwidth = device.flops.get(dtype, math.inf), device.mem_bandwidth
    if op == "gemm":
        m, n, k = at["m"], at["n"], at["k"]
        return max(2 * m * n * k / peak, (m * k + n * k) * size / bandwidth + m * n * 2 / bandwidth) + US
    if op == "prefill_attention":
        s, heads = at["s"], at["sequences"] * at["heads"]
        return max(2 * heads * s * s * at["head_dim"] / peak, 2 * size * s * at["head_dim"] * (heads + at["sequences"]) / bandwidth) + US
    if op == "decode_attention":
        return 2 * size * at["context"] * at["sequences"] * at["head_dim"] / bandwidth + US
    if op == "experts":
        touched = at["experts"] * (1 - math.pow(1 - at["top_k"] / at["experts"], at["tokens"]))
        weights = 3 * touched * at["hidden"] * at["ffn"] * size
        return max(6 * at["tokens"] * at["top_k"] * at["hidden"] * at["ffn"] / peak, weights / bandwidth) + US
    return at["bytes"] / bandwidth + US


@dataclass(frozen=True)
class MeasuredCollectives:
    """Collectives of groups that were measured, on as many devices and nodes; what was not is NCCL's model."""

    tables: Sequence[Table] = field(default_factory=shipped)
    otherwise: Nccl = field(default_factory=Nccl)

    def cost(self, topology: Topology, kind: str, devices: Sequence[str], num_bytes: float) -> Cost:
        modelled = self.otherwise.cost(topology, kind, devices, num_bytes)
        members = set(devices)
        if len(members) < 2 or num_bytes <= 0 or any(d not in topology.kinds for d in members):
            return modelled
        nodes = {topology.cluster.node_of[d] for d in members}
        point = {
            "nodes": len(nodes),
            "ranks": len(members),
            "bytes": num_bytes * (len(members) / (len(members) - 1) if kind == "all_to_all" else 1),
        }
        names = {topology.kinds[d].name for d in members}
        for table in self.tables:
            if table.op == kind and {table.device} == names:
                reading = table.read(point, lambda at: at["bytes"] / 1e11 + 1e-7)
                if reading is not None and reading.how != "extrapolated":
                    return _as_transfer(topology, modelled, reading.seconds, f"{reading.how}: {table.source}", reading.spread)
        return modelled


def _as_transfer(topology: Topology, modelled: Cost, seconds: float, source: str, spread: float) -> Cost:
    """The measured time alone; shared with others it loads the links that the model says, no more than they carry."""
    latency = min(modelled.seconds, 0.9 * seconds)
    rate = modelled.wire_bytes / (seconds - latency)
    links = {i: min(times, topology.links[i].bytes_s / rate) for i, times in modelled.links.items()}
    return Cost(latency, modelled.wire_bytes, rate, links, source, spread)
