"""What a device is to the rest of the house: memory, cores to share out, and arenas that other processes can map."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.platforms.arena import Arena

logger = logging.getLogger(__name__)

GPUS = ("cuda", "rocm")


@dataclass(frozen=True, slots=True)
class Captured:
    """Work that can be queued again by `replay`: it reads and writes the same memory, and leaves `outputs` as its first run did."""

    replay: Callable[[], None]
    outputs: Any


@dataclass(frozen=True, slots=True)
class Fetched:
    """A tensor on its way to the host. event: recorded behind the copy; None: it has arrived."""

    tensor: Tensor
    event: Any = None

    @property
    def is_ready(self) -> bool:
        return self.event is None or self.event.query()

    def result(self) -> Tensor:
        """Waits for it."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


@dataclass(frozen=True, slots=True)
class ComputeShare:
    """A lane's part of a device: on a CPU as many threads as `cores`, disjoint from every other lane's.

    pinned: each thread stays on its core. Otherwise the system places them: two processes that each use part of a machine must not
    both sit on its first cores.
    """

    cores: tuple[int, ...]
    pinned: bool = True

    @property
    def num_threads(self) -> int:
        return len(self.cores)


class Platform(Protocol):
    """One device. `name` is what EngineConfig.device and a kernel's capability call it."""

    name: str
    device: torch.device  # where tensors lie
    capture: Callable[[Callable[[], Any]], Captured] | None  # a graph of what a function queues; None: no such thing here
    depth: int  # steps in flight that keep it busy

    @property
    def num_cores(self) -> int:
        """Cores that this process may use, by affinity and by the quota of its control group."""

    def total_memory(self) -> int:
        """Bytes that this process could ever use."""

    def free_memory(self) -> int:
        """Bytes that can still be taken without swapping or being killed."""

    def create_arena(self, nbytes: int, shared: bool = True) -> Arena:
        """Bytes that another process can map if `shared`; touched lazily."""

    def compute_shares(self, num_threads: Sequence[int]) -> tuple[ComputeShare, ...]:
        """Disjoint shares of these sizes. Errors: InvalidParameter where they exceed the cores at hand."""

    def upload(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device, behind what is queued there. Waits for nothing."""

    def fetch(self, tensor: Tensor) -> Fetched:
        """A device tensor to the host, behind what is queued. Waits for nothing."""

    def enter(self, share: ComputeShare) -> None:
        """Keep the calling thread, and the threads that it starts from now on, inside `share`."""


def select_platform(device: str = "auto") -> Platform:
    """The platform called `device`; 'auto' takes the best present. Errors: Unsupported for an unknown one."""
    from apportion.platforms.cpu import CpuPlatform

    if device in GPUS:
        from apportion.platforms.cuda import CudaPlatform

        return CudaPlatform(device)
    if device not in ("auto", CpuPlatform.name):
        raise Unsupported(f"unknown device {device!r}; this build has: auto, {CpuPlatform.name}, {', '.join(GPUS)}")
    if device == "auto" and torch.cuda.is_available():
        from apportion.platforms.cuda import CudaPlatform, why_not

        name = "rocm" if torch.version.hip else "cuda"
        obstacle = why_not(name) or ("" if find_spec("triton") else "triton is not installed")
        if not obstacle:
            return CudaPlatform(name)
        logger.warning("there is a GPU and the CPU is taken: %s", obstacle)
    return CpuPlatform()


def deal(cores: Sequence[int], num_threads: Sequence[int], pinned: bool = True) -> tuple[ComputeShare, ...]:
    """Cut `cores` into consecutive shares. Errors: InvalidParameter where they do not suffice or a share is empty."""
    if min(num_threads, default=1) < 1:
        raise InvalidParameter(f"a lane needs at least one thread, got {min(num_threads)}")
    if sum(num_threads) > len(cores):
        raise InvalidParameter(f"the lanes ask for {sum(num_threads)} threads together, {len(cores)} cores can be used")
    shares, first = [], 0
    for count in num_threads:
        shares.append(ComputeShare(tuple(cores[first : first + count]), pinned))
        first += count
    return tuple(shares)
