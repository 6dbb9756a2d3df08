"""What the stages run on: a GPU, or with --dry the CPU through Triton's interpreter, on tiny shapes, where no time counts."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apportion.kernels.dispatch import select_ops
from apportion.platforms.platform import Platform

ROUNDS, WARM_UP = 15, 3
PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())


class OutOfTime(Exception):
    """A stage's seconds are over: what it has measured stands."""


@dataclass
class Machine:
    """platform: whose device computes. dry: shapes are shrunk and times mean nothing. facts: what the stage `device` found."""

    platform: Platform
    dry: bool
    facts: dict[str, Any] = field(default_factory=dict)
    deadline: float = float("inf")

    def __post_init__(self) -> None:
        self.ops: Any = select_ops(self.platform, prefer="triton" if self.dry else "auto")
        self.device = self.platform.device

    def shrunk(self, size: int, to: int) -> int:
        return min(size, to) if self.dry else size

    def copies(self, nbytes: int) -> int:
        """How many operands of nbytes are needed so that each is read from memory again."""
        return 2 if self.dry else max(2, min(64, -(-4 * self.facts["l2_bytes"] // nbytes)))

    def floor_us(self, nbytes: float) -> float:
        """Reading nbytes at the rate of a large copy."""
        return nbytes / self.facts["bytes_per_s"] * 1e6

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32 if self.dry else dtype).to(dtype)

    def microseconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median time of one call. Give several calls over different memory, together beyond the L2 cache, or the cache is measured.

        On a GPU calls are captured in a graph, so that launching costs nothing, and replayed between two events.
        Errors: OutOfTime.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime
        for call in calls:
            call()
        if self.device.type != "cuda":
            started = time.perf_counter()
            calls[-1]()
            return (time.perf_counter() - started) * 1e6
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(WARM_UP + ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
        return statistics.median(times[WARM_UP:])


def geomean(ratios: Sequence[float]) -> float | None:
    return statistics.geometric_mean(ratios) if ratios else None


def row(what: str, us: float, floor_us: float, peer_us: float | None = None, **more: Any) -> dict[str, Any]:
    """A line of the table. peer_us: of what does the same elsewhere or in the library; None where it is not known."""
    return {"what": what, "us": us, "floor_us": floor_us, "peer_us": peer_us, **more}
