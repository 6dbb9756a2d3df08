"""The CPU: its cores, its memory, and which of both this process may use."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from apportion.platforms import memory
from apportion.platforms.arena import Arena
from apportion.platforms.platform import ComputeShare, Fetched, deal

_TOPOLOGY = Path("/sys/devices/system/cpu")


def processor_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_model() -> str:
    """Numbers of family and model, which tell processors apart that a virtual machine gives one name; empty where they are not told."""
    return " ".join(filter(None, (_cpuinfo("cpu family"), _cpuinfo("model"))))


def _cpuinfo(field: str) -> str:
    """Of the first processor that Linux lists; empty elsewhere."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    return ""


class CpuPlatform:
    """platforms/platform.Platform for the CPU of this machine."""

    name = "cpu"
    device = torch.device("cpu")
    capture = None
    depth = 1  # steps take every core: a second one in flight would only wait

    @cached_property
    def cores(self) -> tuple[int, ...]:
        """Logical cores this process may run on, siblings of one physical core side by side."""
        return tuple(sorted(os.sched_getaffinity(0), key=lambda core: (*_physical_core(core), core)))

    @cached_property
    def num_cores(self) -> int:
        return max(1, min([len(self.cores), *(int(quota) for quota in _quotas())]))

    def total_memory(self) -> int:
        return memory.total_memory()

    def free_memory(self) -> int:
        return memory.free_memory()

    def create_arena(self, nbytes: int, shared: bool = True) -> Arena:
        return Arena.create(nbytes, shared)

    def compute_shares(self, num_threads: Sequence[int]) -> tuple[ComputeShare, ...]:
        """One thread to a physical core where there are enough of them; else siblings stay in one share as far as possible.

        Threads are pinned when they take every physical core.
        """
        one_each = tuple({_physical_core(core): core for core in reversed(self.cores)}.values())[::-1]
        total = sum(num_threads)
        return deal(one_each if total <= len(one_each) else self.cores, num_threads, pinned=total >= len(one_each))

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def fetch(self, tensor: torch.Tensor) -> Fetched:
        return Fetched(tensor)

    def enter(self, share: ComputeShare) -> None:
        if share.pinned:
            os.sched_setaffinity(0, share.cores)


def _physical_core(core: int) -> tuple[int, int]:
    """(package, core in it); a core of its own where the system does not tell."""
    folder = _TOPOLOGY / f"cpu{core}" / "topology"
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except FileNotFoundError:
        return 0, core


def _quotas() -> list[float]:
    """CPU time that the control groups of this process allow, in cores."""
    quotas = []
    for folder, is_v2 in memory.cgroup_folders("cpu"):
        names = ("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        if all((folder / name).exists() for name in names):
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
    return quotas
