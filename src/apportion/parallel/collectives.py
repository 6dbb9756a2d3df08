"""Collectives of one process group over gloo: what crosses between ranks, and a sentence that names the rank when one is missing."""

from __future__ import annotations

import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from apportion.core.errors import ExecutorDied


class GlooCollectives:
    """All ranks call the same operations in the same order. Tensors are contiguous, on the CPU."""

    def __init__(self, store_path: str, rank: int, size: int, timeout_s: float) -> None:
        """Meets the other ranks through the file `store_path`; blocks until all are there.

        Errors: ExecutorDied when they are not within `timeout_s`.
        """
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=timeout_s)
        try:
            store = dist.FileStore(store_path, size)
            store.set_timeout(timedelta(seconds=timeout_s))
            self._groups = [dist.ProcessGroupGloo(store, rank, size, options)]
        except RuntimeError as error:
            raise self._lost("joining the group", error) from error
        # A group that outlives the interpreter's end aborts the process: its threads are joined before.
        weakref.finalize(self, self._groups.clear)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place. Every rank receives the same bytes."""
        try:
            self._groups[0].allreduce([x]).wait()
        except RuntimeError as error:
            raise self._lost("all_reduce", error) from error
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in rank order; they have one shape."""
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        try:
            self._groups[0].allgather([gathered], [x]).wait()
        except RuntimeError as error:
            raise self._lost("all_gather", error) from error
        return gathered

    def _lost(self, operation: str, error: RuntimeError) -> ExecutorDied:
        reason = str(error).splitlines()[0].partition(". This is")[0]
        return ExecutorDied(f"rank {self.rank} of {self.size} lost a peer in {operation} (limit {self.timeout_s:g} s): {reason}")
