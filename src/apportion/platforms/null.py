"""No device: memory and cores as told, for tests of whoever plans over a platform."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apportion.platforms.arena import Arena
from apportion.platforms.platform import ComputeShare, Fetched, deal


class NullPlatform:
    """platforms/platform.Platform with given sizes; nothing is pinned. memory: bytes free and in all."""

    name = "null"
    device = torch.device("cpu")
    capture = None
    depth = 1

    def __init__(self, memory: int = 1 << 30, num_cores: int = 2) -> None:
        self._memory = memory
        self.num_cores = num_cores

    def total_memory(self) -> int:
        return self._memory

    def free_memory(self) -> int:
        return self._memory

    def create_arena(self, nbytes: int, shared: bool = True) -> Arena:
        return Arena.create(nbytes, shared)

    def compute_shares(self, num_threads: Sequence[int]) -> tuple[ComputeShare, ...]:
        return deal(range(self.num_cores), num_threads)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def fetch(self, tensor: torch.Tensor) -> Fetched:
        return Fetched(tensor)

    def enter(self, share: ComputeShare) -> None:
        """There is nowhere to go."""
