"""The read bandwidth of this machine, and the floor it puts under a step: bytes that must be read / bytes a second.

Reads through the same ThreadTeam as the kernels, out of ordinary pages and out of huge ones (the processor's prefetchers stop at
page borders, so huge pages read faster). The best of several passes over a buffer: interference only ever slows a pass down.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from apportion.kernels.cpu.extension import load

BUFFER_BYTES = 512 << 20  # about the weights of bench-250m, so what a shared outer cache keeps is kept for both


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes a second of num_threads threads reading."""

    num_threads: int
    buffer_bytes: int
    ordinary_pages: float
    huge_pages: float

    @property
    def best(self) -> float:
        return max(self.ordinary_pages, self.huge_pages)

    def floor_s(self, nbytes: float) -> float:
        """Seconds that reading nbytes takes at least."""
        return nbytes / self.best

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"best": self.best}


def measure_bandwidth(num_threads: int | None = None, buffer_bytes: int = BUFFER_BYTES, passes: int = 10) -> Bandwidth:
    """Takes about a second. Errors: Unsupported where the CPU kernels are not built."""
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[: num_threads or len(cores)]
    module = load()
    team = module.ThreadTeam(len(cores), cores)
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores[:1])  # the caller is thread 0 of the team
    try:
        rates = []
        for huge in (False, True):
            buffer = mmap.mmap(-1, buffer_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if huge:
                buffer.madvise(mmap.MADV_HUGEPAGE)
            tensor = torch.frombuffer(buffer, dtype=torch.uint8).fill_(1)
            rates.append(buffer_bytes / min(_timed(module, team, tensor) for _ in range(passes)))
            del tensor, buffer
    finally:
        os.sched_setaffinity(0, affinity)
    return Bandwidth(len(cores), buffer_bytes, *rates)


def _timed(module: Any, team: Any, tensor: torch.Tensor) -> float:
    start = time.perf_counter()
    module.read_memory(team, tensor.data_ptr(), tensor.numel())
    return time.perf_counter() - start
