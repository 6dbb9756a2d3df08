"""Time of device work: calls captured in a graph, so that launching costs nothing, replayed between two events; medians of rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

ROUNDS = 15
WARM_UP = 3


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call. Give several calls over different memory, together beyond the L2 cache, or the cache is measured."""
    for call in calls:
        call()
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


def copies(nbytes: int, l2_bytes: int) -> int:
    """How many operands of nbytes are needed so that each is read from memory again."""
    return max(2, min(64, -(-4 * l2_bytes // nbytes)))


def geomean(ratios: Sequence[float]) -> float:
    return statistics.geometric_mean(ratios) if ratios else float("nan")
