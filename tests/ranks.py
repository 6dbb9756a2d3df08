"""Tensor-parallel ranks as threads of one process: the collectives without a network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from apportion.parallel.groups import ParallelGroup


class ThreadCollectives:
    """parallel/groups.Collectives of one rank. `parts` and `barrier` are shared by all."""

    def __init__(self, rank: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.parts, self.barrier = rank, parts, barrier

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.parts[self.rank] = x.clone()
        self.barrier.wait()
        gathered = list(self.parts)
        self.barrier.wait()
        return gathered

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self.all_gather(x)).sum(0))


def on_ranks(size: int, work: Callable[[ParallelGroup], Any]) -> list[Any]:
    """What `work` gives on each rank of a group of `size`. A rank that fails ends the others."""
    parts, barrier = [None] * size, threading.Barrier(size, timeout=60)

    def run(rank: int) -> Any:
        try:
            with torch.inference_mode():  # the mode belongs to a thread
                return work(ParallelGroup(rank, size, ThreadCollectives(rank, parts, barrier)))
        except threading.BrokenBarrierError:
            return None
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
