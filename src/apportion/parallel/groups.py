"""Who computes together: a rank, the size of its group, and the operations layers call on it.

A group of one needs no network and its operations are the identity, so a model is written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from apportion.core.errors import InvalidParameter

COLLECTIVE_TIMEOUT_S = 60.0


class Collectives(Protocol):
    def all_reduce(self, x: Tensor) -> Tensor: ...
    def all_gather(self, x: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of x over the ranks, in place where x is contiguous; the same bytes on every rank."""
        if self.collectives is None:
            return x
        return self.collectives.all_reduce(x.contiguous())

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        """x [..., n] of every rank -> [..., size * n], in rank order."""
        if self.collectives is None:
            return x
        return torch.cat(self.collectives.all_gather(x.contiguous()), dim=-1)


def connect(rank: int, size: int, store_path: str, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> ParallelGroup:
    """The group of `size` processes that meet through the file `store_path` (gloo over loopback)."""
    if not 0 <= rank < size:
        raise InvalidParameter(f"rank {rank} is outside a group of {size}")
    if size == 1:
        return ParallelGroup()
    from apportion.parallel.collectives import GlooCollectives

    return ParallelGroup(rank, size, GlooCollectives(store_path, rank, size, timeout_s))
