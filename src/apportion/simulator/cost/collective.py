"""What a communication costs on a topology: latency, bytes on the wire, the rate alone, and the links it loads.

NCCL's tuning model (src/graph/tuning.cc, versions 2.9 to 2.11): ring or tree, and the protocols LL, LL128 and Simple; the cheapest is
taken, as NCCL does. Rings run over NVLink where the group is connected by it, else over PCIe and sockets; between nodes a ring leaves
through as many NICs as its members are next to. Pairs, scatters and all-to-alls load the routes they take.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apportion.core.errors import Unsupported
from apportion.simulator.htae import Cost
from apportion.simulator.topology import Topology

US = 1e-6
# (algorithm, protocol) -> base latency, and latency per hop over nvlink, pcie, net; microseconds.
LATENCY = {
    ("ring", "ll"): (3.6, {"nvlink": 0.47, "pcie": 1.0, "net": 2.7}),
    ("ring", "ll128"): (10.0, {"nvlink": 1.9, "pcie": 2.5, "net": 4.0}),
    ("ring", "simple"): (8.4, {"nvlink": 3.4, "pcie": 5.7, "net": 9.6}),
    ("tree", "ll"): (4.4, {"nvlink": 0.52, "pcie": 1.0, "net": 5.0}),
    ("tree", "ll128"): (4.4, {"nvlink": 1.25, "pcie": 1.9, "net": 8.5}),
    ("tree", "simple"): (0.0, {"nvlink": 28.0, "pcie": 28.0, "net": 28.0}),
}
LL_BUS = {70: 39e9, 80: 87.7e9}  # bytes/s that LL reaches in one node, by compute capability
LL_BUS_NEWEST = 141e9
PLATEAU_FACTOR, PLATEAU_BYTES = 1.9, 65536 / 16  # a ring all-reduce between nodes is slower from this size per rank on
SPREAD = 0.15  # of this model against measured collectives; measured tables and calibration replace it
RINGS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


@dataclass(frozen=True)
class Nccl:
    """The collectives of NCCL on a topology. choices: the (algorithm, protocol) pairs that may be taken.

    latency_factor: of every latency.
    """

    choices: tuple[tuple[str, str], ...] = tuple(LATENCY)
    latency_factor: float = 1.0

    def cost(self, topology: Topology, kind: str, devices: Sequence[str], num_bytes: float) -> Cost:
        """Of one message, counted as `layout.Transfer.volume` does. Error: Unsupported for a kind that is none of the known."""
        members = sorted(set(devices), key=lambda d: (topology.cluster.node_of.get(d, 0), _number(d)))
        if len(members) == 1:
            return Cost(0.0, source="one member")
        if any(d not in topology.kinds for d in members):  # host memory takes part: a copy engine, not NCCL
            return self._routes(topology, kind, devices, num_bytes, 5 * US)
        if kind in RINGS:
            return self._ring(topology, kind, members, num_bytes)
        if kind in ("p2p", "scatter", "gather", "all_to_all"):
            latency = self._hop(topology, members) + LATENCY["ring", "simple"][0]
            return self._routes(topology, kind, devices, num_bytes, latency * US * self.latency_factor)
        raise Unsupported(
            f"the cost of the communication {kind!r} is not known; known: {', '.join(RINGS)}, p2p, scatter, gather, all_to_all"
        )

    def _hop(self, topology: Topology, members: Sequence[str]) -> float:
        kinds = {topology.links[i].kind for i in topology.path(members[0], members[-1])}
        return LATENCY["ring", "simple"][1]["net" if "net" in kinds else "nvlink" if kinds == {"nvlink"} else "pcie"]

    # -- rings and trees

    def _ring(self, topology: Topology, kind: str, members: Sequence[str], num_bytes: float) -> Cost:
        nodes = _by_node(topology, members)
        links, intra = ring_links(topology, nodes)
        bus = min(topology.links[i].bytes_s / times for i, times in links.items())
        kind_of = topology.kinds[members[0]]
        best: Cost | None = None
        for algorithm, protocol in self.choices:
            if algorithm == "tree" and kind != "all_reduce":
                continue
            speed = _bus_bandwidth(algorithm, protocol, kind, bus, nodes, kind_of.compute_capability)
            latency = _latency(algorithm, protocol, kind, nodes, intra, num_bytes) * US * self.latency_factor
            n = len(members)
            factor = 2.0 if algorithm == "tree" else {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0}.get(kind, (n - 1) / n)
            cost = Cost(latency, num_bytes * factor, speed, links, f"nccl {algorithm} {protocol}", SPREAD)
            if best is None or cost.total < best.total:
                best = cost
        if best is None:
            raise Unsupported(f"none of the algorithms {list(self.choices)} can do {kind!r}")
        return best

    # -- everything that is a set of messages

    def _routes(self, topology: Topology, kind: str, devices: Sequence[str], num_bytes: float, latency: float) -> Cost:
        """num_bytes: of the busiest member; for a pair, what arrives."""
        links: dict[int, float] = defaultdict(float)
        if kind == "all_to_all":
            pairs = [(a, b, 1 / (len(devices) - 1)) for a in devices for b in devices if a != b]
        elif kind == "gather":
            pairs = [(d, devices[-1], 1 / (len(devices) - 1)) for d in devices[:-1]]
        else:  # of a broadcast from the host everyone takes all of it
            share = 1.0 if kind in ("p2p", "broadcast") else 1 / (len(devices) - 1)
            pairs = [(devices[0], d, share) for d in devices[1:]]
        for a, b, share in pairs:
            for i in topology.path(a, b):
                links[i] += share
        rate = min(topology.links[i].bytes_s / times for i, times in links.items())
        return Cost(latency, num_bytes, rate, dict(links), f"route {kind}", SPREAD)


def _number(device: str) -> int:
    return int(device.split(":")[1])


def _by_node(topology: Topology, members: Sequence[str]) -> list[list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for d in members:
        found[topology.cluster.node_of[d]].append(d)
    return list(found.values())


def ring_links(topology: Topology, nodes: Sequence[Sequence[str]]) -> tuple[dict[int, float], str]:
    """How often a byte that passes each cut of the ring crosses each link; and the kind of hop inside nodes."""
    links: dict[int, float] = defaultdict(float)
    intra = "nvlink"
    for members in nodes:
        if len(members) > 1 and not _mesh(topology, members, links):
            for a, b in zip(members, members[1:] if len(nodes) > 1 else [*members[1:], members[0]], strict=False):
                path = topology.path(a, b)
                intra = intra if all(topology.links[i].kind == "nvlink" for i in path) else "pcie"
                for i in path:
                    links[i] += 1
    if len(nodes) > 1:
        for here, there in zip(nodes, [*nodes[1:], nodes[0]], strict=True):
            exits = _exits(topology, here, there)
            for path in exits:
                for i in path:
                    if topology.links[i].kind == "net":
                        links[i] += 1 / len(exits)
    return dict(links), intra


def _mesh(topology: Topology, members: Sequence[str], links: dict[int, float]) -> bool:
    """Rings over NVLink between devices without a switch: every connection carries in proportion to its width."""
    inside = [(i, link) for i, link in enumerate(topology.links) if link.source in members and link.target in members]
    width: Mapping[str, float] = defaultdict(float)
    for _, link in inside:
        width[link.source] += link.bytes_s  # type: ignore[index]
    if len(width) < len(members) or not _connected(members, {(link.source, link.target) for _, link in inside}):
        return False
    narrowest = min(width.values())
    for i, link in inside:
        links[i] += link.bytes_s / narrowest
    return True


def _connected(members: Sequence[str], pairs: set[tuple[str, str]]) -> bool:
    reached, frontier = {members[0]}, [members[0]]
    while frontier:
        at = frontier.pop()
        fresh = {b for a, b in pairs if a == at} - reached
        reached |= fresh
        frontier += fresh
    return reached >= set(members)


def _exits(topology: Topology, here: Sequence[str], there: Sequence[str]) -> list[tuple[int, ...]]:
    """Routes to the next node, one per NIC that some member is next to."""
    found: dict[int, tuple[int, ...]] = {}
    for i, member in enumerate(here):
        path = topology.path(member, there[min(i, len(there) - 1)])
        found.setdefault(next(link for link in path if topology.links[link].kind == "net"), path)
    return list(found.values())


def _bus_bandwidth(algorithm: str, protocol: str, kind: str, bus: float, nodes: Sequence[Sequence[str]], cc: int) -> float:
    """bytes/s through every cut, from the bandwidth of the links."""
    one_node = len(nodes) == 1
    ll_bus = LL_BUS.get(cc, LL_BUS[70] if cc < 70 else LL_BUS_NEWEST)
    if algorithm == "tree":
        bus *= 0.92
        return {"ll": min(bus / 3.8, ll_bus), "ll128": bus * (7 / 9 if one_node else 120 / 128), "simple": bus}[protocol]
    ll = bus / (4 if kind == "all_reduce" or not one_node else 3)
    return {"ll": min(ll, ll_bus), "ll128": bus * (0.7 if max(map(len, nodes)) < 2 else 0.92), "simple": bus}[protocol]


def _latency(algorithm: str, protocol: str, kind: str, nodes: Sequence[Sequence[str]], intra: str, num_bytes: float) -> float:
    """Microseconds."""
    base, hop = LATENCY[algorithm, protocol]
    n, num_nodes = sum(map(len, nodes)), len(nodes)
    if algorithm == "tree":
        return base + 2 * ((max(map(len, nodes)) - 1) * hop[intra] + math.log2(num_nodes) * hop["net"])
    steps = {"all_reduce": 2 * (n - 1), "broadcast": n}.get(kind, n - 1)
    between = 0 if num_nodes == 1 else {"all_reduce": 2 * (num_nodes - 1), "broadcast": num_nodes}.get(kind, num_nodes - 1)
    latency = base + (steps - between) * hop[intra] + between * hop["net"]
    if kind == "all_reduce" and num_nodes > 1 and protocol == "simple" and num_bytes >= n * PLATEAU_BYTES:
        latency *= PLATEAU_FACTOR
    return latency
