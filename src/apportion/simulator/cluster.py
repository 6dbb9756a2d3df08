"""Where a strategy runs: devices by name, nodes that hold them, and named meshes over them. Knows nothing of models.

A device is a string, 'gpu:3' or 'cpu:0': its kind and its number in the cluster. Host memory is the device 'cpu:<node>'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from apportion.core.errors import InvalidParameter


@dataclass(frozen=True)
class DeviceMesh:
    """Devices in a grid whose axes have names. axes: (name, size), outermost first; devices: row-major."""

    axes: tuple[tuple[str, int], ...]
    devices: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise InvalidParameter(f"a device mesh names an axis twice: {names}")
        if any(size < 1 for _, size in self.axes) or math.prod(size for _, size in self.axes) != len(self.devices):
            raise InvalidParameter(f"a device mesh of axes {dict(self.axes)} does not hold {len(self.devices)} devices")
        if len(set(self.devices)) != len(self.devices):
            raise InvalidParameter(f"a device mesh holds a device twice: {list(self.devices)}")

    @classmethod
    def of(cls, devices: Sequence[str], **axes: int) -> DeviceMesh:
        return cls(tuple(axes.items()), tuple(devices))

    @cached_property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    def coordinates(self, index: int) -> dict[str, int]:
        """axis -> coordinate of the index-th device."""
        found = {}
        for name, size in reversed(self.axes):
            index, found[name] = divmod(index, size)
        return found

    def select(self, **where: int) -> DeviceMesh:
        """The slice at these coordinates: `mesh.select(pp=1)` is the second pipeline stage's mesh."""
        for name, coordinate in where.items():
            if name not in self.sizes:
                raise InvalidParameter(f"no axis {name!r} in a device mesh of axes {dict(self.axes)}")
            if not 0 <= coordinate < self.sizes[name]:
                raise InvalidParameter(f"coordinate {coordinate} is outside axis {name!r} of size {self.sizes[name]}")
        kept = [d for i, d in enumerate(self.devices) if where.items() <= self.coordinates(i).items()]
        return DeviceMesh(tuple(axis for axis in self.axes if axis[0] not in where), tuple(kept))


@dataclass(frozen=True)
class Cluster:
    """nodes: the devices of each node, its host memory 'cpu:<node>' not counted. Links and speeds are the executor's."""

    nodes: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, num_nodes: int, devices_per_node: int, kind: str = "gpu") -> Cluster:
        if num_nodes < 1 or devices_per_node < 1:
            raise InvalidParameter(f"a cluster of {num_nodes} nodes of {devices_per_node} devices is empty")
        return cls(tuple(tuple(f"{kind}:{n * devices_per_node + i}" for i in range(devices_per_node)) for n in range(num_nodes)))

    @cached_property
    def node_of(self) -> dict[str, int]:
        placed = {device: n for n, devices in enumerate(self.nodes) for device in devices}
        return placed | {f"cpu:{n}": n for n in range(len(self.nodes)) if f"cpu:{n}" not in placed}

    def mesh(self, **axes: int) -> DeviceMesh:
        """A mesh over the first devices of the cluster, in order: the last axis is the nearest."""
        devices = [device for node in self.nodes for device in node]
        size = math.prod(axes.values())
        if size > len(devices):
            raise InvalidParameter(f"a mesh of axes {axes} needs {size} devices, the cluster has {len(devices)}")
        return DeviceMesh.of(devices[:size], **axes)

    def distance(self, a: str, b: str) -> int:
        """0 the same device, 1 the same node, 2 another node."""
        for device in (a, b):
            if device not in self.node_of:
                raise InvalidParameter(f"no device {device!r} in the cluster")
        return 0 if a == b else 1 if self.node_of[a] == self.node_of[b] else 2
