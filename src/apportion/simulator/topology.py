"""The links of a cluster: directed, with capacities, from devices over NVLink, PCIe, sockets and NICs to the network. Knows no messages.

A node is named in `hardware.yaml` or written out in the same words. Host memory 'cpu:<node>' hangs on every socket of its node.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from apportion.core.errors import InvalidParameter
from apportion.simulator.cluster import Cluster
from apportion.simulator.fields import typed

GB = 1e9
LINKS: Mapping[str, Mapping[str, Any]] = {  # of a node: what each kind is described by
    "nvlink": {"gb_s": float, "pairs": list[tuple[int, int, int]]},
    "pcie": {"gb_s": float, "switches": int, "sockets": int, "socket_gb_s": float},
    "nics": {"count": int, "gb_s": float},
}
SWITCH: Mapping[str, Any] = {"nodes": list[int], "parent": str, "gb_s": float}
CHANGES = {"device": str, "num_devices": int, "source": str, **dict.fromkeys(LINKS, Mapping[str, Any] | None)}
# How much a hop of each kind is to be avoided. A route takes the kinds that stand first, however many hops they need.
AVOID = {"nvlink": 1, "pcie": 10, "socket": 100, "host": 500, "net": 10000}


@dataclass(frozen=True)
class Device:
    """A kind of device. flops: dtype -> dense peak, operations/s; mem_bandwidth in bytes/s, mem_bytes in bytes."""

    name: str
    mem_bytes: float
    mem_bandwidth: float
    flops: Mapping[str, float]
    num_sms: int
    compute_capability: int
    source: str


@dataclass(frozen=True)
class Link:
    """One direction. kind: nvlink, pcie, socket, host or net."""

    source: str
    target: str
    bytes_s: float
    kind: str


@dataclass
class Topology:
    """cluster: the devices by node. kinds: device name -> what it is."""

    cluster: Cluster
    kinds: dict[str, Device]
    links: list[Link] = field(default_factory=list)
    routes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    def connect(self, a: str, b: str, bytes_s: float, kind: str) -> None:
        """A full-duplex connection."""
        if bytes_s <= 0:
            raise InvalidParameter(f"the link from {a!r} to {b!r} has a bandwidth of {bytes_s:g} bytes/s")
        self.links += [Link(a, b, bytes_s, kind), Link(b, a, bytes_s, kind)]
        self.routes.clear()

    def scaled(self, factors: Mapping[str, float]) -> Topology:
        """The same links, those of each kind `factor` times as fast: what calibration fits."""
        links = [replace(link, bytes_s=link.bytes_s * factors.get(link.kind, 1.0)) for link in self.links]
        return Topology(self.cluster, self.kinds, links, self.routes)

    @property
    def capacity(self) -> list[float]:
        return [link.bytes_s for link in self.links]

    def path(self, a: str, b: str) -> tuple[int, ...]:
        """Numbers of the links from a to b. Error: InvalidParameter where nothing leads there."""
        if a not in self.routes:
            self.routes[a] = self._routes_from(a)
        if b not in self.routes[a]:
            raise InvalidParameter(f"the cluster is not connected: no link leads from {a!r} to {b!r}")
        return self.routes[a][b]

    def _routes_from(self, start: str) -> dict[str, tuple[int, ...]]:
        out: dict[str, list[int]] = defaultdict(list)
        for i, link in enumerate(self.links):
            out[link.source].append(i)
        found: dict[str, tuple[int, ...]] = {}
        frontier: list[tuple[int, str, tuple[int, ...]]] = [(0, start, ())]
        while frontier:
            distance, at, path = heapq.heappop(frontier)
            if at in found:
                continue
            found[at] = path
            for i in out[at]:
                link = self.links[i]
                heapq.heappush(frontier, (distance + AVOID[link.kind], link.target, (*path, i)))
        return found


@cache
def _library() -> dict[str, Any]:
    data = yaml.safe_load((files("apportion.simulator") / "hardware.yaml").read_text(encoding="utf-8"))
    return dict(data)


def device_names() -> list[str]:
    return sorted(_library()["devices"])


def node_names() -> list[str]:
    return sorted(_library()["nodes"])


def device(name: str) -> Device:
    """A kind of device of the library."""
    known = _library()["devices"]
    if name not in known:
        raise InvalidParameter(f"unknown device {name!r}; known: {', '.join(sorted(known))}")
    found = known[name]
    flops = {dtype: peak * 1e12 for dtype, peak in found["flops"].items()}
    return Device(name, found["mem_gb"] * GB, found["mem_gb_s"] * GB, flops, found["sm"], found["cc"], found["source"])


def topology(
    node: str | Mapping[str, Any],
    num_nodes: int = 1,
    fabric: Mapping[str, Any] | None = None,
    used_devices: int | None = None,
    **changes: Any,
) -> Topology:
    """`num_nodes` equal nodes. node: a name of the library, or its description; changes: over the description (nics={...}).

    used_devices: of each node only the first so many run; the links are the whole node's, so that they reach the NICs they are next to.
    fabric: switches above the nodes: name -> {nodes: [..]} or {parent: name, gb_s: ..}; None: one switch that is never the bottleneck.
    Errors: InvalidParameter for unknown names and fields, for switches that stand above themselves, for a node that no switch holds.
    """
    spec = typed("a node", _node(node) | changes, CHANGES, needed=("device", "num_devices", "pcie", "nics"))
    for name, types in LINKS.items():
        if spec.get(name) is not None:
            typed(name, spec[name], types, needed=[field for field in types if field != "pairs"])
    kind = device(spec["device"])
    prefix = "cpu" if kind.compute_capability == 0 else "gpu"
    cluster = Cluster.of(num_nodes, spec["num_devices"], prefix)
    built = Topology(cluster, dict.fromkeys([d for devices in cluster.nodes for d in devices], kind))
    for n, devices in enumerate(cluster.nodes):
        _nvlink(built, f"node{n}", devices, spec.get("nvlink"))
        _pcie(built, n, devices, spec["pcie"], spec["nics"])
    _fabric(built, spec["nics"]["count"], fabric or {"fabric": {"nodes": list(range(num_nodes))}})
    if used_devices is not None:
        if not 1 <= used_devices <= spec["num_devices"]:
            raise InvalidParameter(f"{used_devices} devices of a node are to be used, which has {spec['num_devices']}")
        built.cluster = Cluster(tuple(devices[:used_devices] for devices in cluster.nodes))
    return built


def _node(node: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(node, str):
        return dict(node)
    known = _library()["nodes"]
    if node not in known:
        raise InvalidParameter(f"unknown node {node!r}; known: {', '.join(sorted(known))}")
    return dict(known[node])


def _nvlink(built: Topology, name: str, devices: Sequence[str], nvlink: Mapping[str, Any] | None) -> None:
    if nvlink is None:
        return
    if "pairs" not in nvlink:
        for d in devices:
            built.connect(d, f"{name}.nvswitch", nvlink["gb_s"] * GB, "nvlink")
        return
    for a, b, count in nvlink["pairs"]:
        if a < len(devices) and b < len(devices):
            built.connect(devices[a], devices[b], count * nvlink["gb_s"] * GB, "nvlink")


def _pcie(built: Topology, n: int, devices: Sequence[str], pcie: Mapping[str, Any], nics: Mapping[str, Any]) -> None:
    name, switches, sockets = f"node{n}", pcie["switches"], pcie["sockets"]
    for s in range(sockets):
        built.connect(f"cpu:{n}" if f"cpu:{n}" not in built.kinds else f"host:{n}", f"{name}.socket{s}", 100 * GB, "host")
        if s:
            built.connect(f"{name}.socket{s - 1}", f"{name}.socket{s}", pcie["socket_gb_s"] * GB, "socket")
    for i in range(switches):
        built.connect(f"{name}.pcie{i}", f"{name}.socket{i * sockets // switches}", pcie["gb_s"] * GB, "pcie")
    for i, d in enumerate(devices):
        built.connect(d, f"{name}.pcie{i * switches // len(devices)}", pcie["gb_s"] * GB, "pcie")
    for i in range(nics["count"]):
        built.connect(f"{name}.pcie{i * switches // nics['count']}", f"{name}.nic{i}", max(pcie["gb_s"], nics["gb_s"]) * GB, "pcie")
        built.connect(f"{name}.nic{i}", f"{name}.port{i}", nics["gb_s"] * GB, "net")


def _fabric(built: Topology, num_nics: int, fabric: Mapping[str, Any]) -> None:
    num_nodes = len(built.cluster.nodes)
    for name, switch in fabric.items():
        typed(f"switch {name!r}", switch, SWITCH)
    for name in fabric:
        seen = [name]
        while (parent := fabric[seen[-1]].get("parent")) is not None:
            if parent not in fabric:
                raise InvalidParameter(f"switch {seen[-1]!r} hangs on {parent!r}, which the fabric does not have")
            if parent in seen:
                raise InvalidParameter(f"the fabric is cyclic: {' -> '.join([*seen, parent])}")
            seen.append(parent)
    held = [n for switch in fabric.values() for n in switch.get("nodes", ())]
    if sorted(held) != list(range(num_nodes)):
        raise InvalidParameter(
            f"the switches of the fabric hold nodes {sorted(held)}; the cluster has nodes 0 to {num_nodes - 1}, each once"
        )
    for name, switch in fabric.items():
        for n in switch.get("nodes", ()):
            for i in range(num_nics):
                built.connect(f"node{n}.port{i}", name, 1e6 * GB, "net")
        if "parent" in typed(f"switch {name!r}", switch, SWITCH, needed=("gb_s",) if "parent" in switch else ()):
            built.connect(name, switch["parent"], switch["gb_s"] * GB, "net")
