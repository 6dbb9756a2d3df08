"""Runs a step under a cap on the process's memory (RLIMIT_DATA): whether it fits, which the simulator said before.

The cap counts what a process maps beyond what it holds once torch, gloo and kernels are loaded and the graph is compiled. Every tensor of
64 KiB and more is mapped on its own, so that what is freed is gone.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import resource

from apportion.simulator.execution_graph import COMPUTE
from apportion.simulator.htae import Cost, execute
from apportion.simulator.layout import volume
from apportion.simulator.memory import Overheads, memory_of
from recipes.simulator.cases import CLUSTER, graph_of

ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CAPS = {"fits": 1.1, "out of memory": 0.9}  # of the prediction, and what is then to happen
CASES = (
    ("mlp-4x2048", "single"), ("gpt-6x384", "single"), ("gpt-4x256", "single-recompute"), ("gpt-4x256", "single-accumulate-4"),
    ("cnn-small", "single"), ("mlp-4x2048", "ddp-25mb"), ("gpt-6x384", "ddp-25mb"), ("gpt-4x256", "zero1"), ("mlp-2x1024", "zero3"),
    ("gpt-4x256", "tp2"), ("gpt-6x384", "pp2-1f1b-4"), ("mlp-4x2048", "pp2-1f1b-4"),
    # Not looked at while messages were learned to be counted:
    ("gpt-4x256", "zero3"), ("gpt-6x384", "zero2"), ("cnn-small", "zero2"), ("mlp-2x1024", "ddp-1mb"), ("gpt-6x384", "tp2"),
    ("mlp-4x2048", "tp2"),
)  # fmt: skip
WARM = ("mlp-3x768", "gpt-2x128", "cnn-wide")  # every kind of operator once: what is imported on first use is not the step's


def predicted(model, strategy):
    """Peak bytes of each device. A step's order on one core hardly depends on its costs: every task takes as long."""
    graph = graph_of(model, strategy)
    timeline = execute(graph, [Cost(1e-3)] * len(graph.tasks))
    memory = memory_of(graph, timeline, Overheads.none())
    return {device: _peak(graph, timeline, memory[device].curve, device) for device in memory}


def _peak(graph, timeline, curve, device):
    """In the order in which `two_ranks` issues: a message is under way until somebody waits for it."""
    under_way, peak = {}, 0.0
    for task in (t for t in graph.tasks if device in t.devices):
        for predecessor in graph.predecessors[task.id]:
            under_way.pop(predecessor, None)
        held = curve[bisect.bisect_right(curve, timeline.start[task.id], key=lambda point: point[0]) - 1][1]
        if task.kind == COMPUTE or task.stream == COMPUTE:
            peak = max(peak, held + sum(under_way.values()) + (_beside(graph, task) if task.op else 0))
        else:
            under_way[task.id] = _message(graph, task, device)
            peak = max(peak, held + sum(under_way.values()))
    return peak


def _message(graph, task, device):
    """Bytes of a message beside the graph's buffers: what `two_ranks` packs it into, and gloo's own copy of what it scatters."""
    reads, writes = (
        sum(
            graph.buffers[v.buffer].itemsize * volume(v.box)
            for p in task.pieces
            for v in side(p)
            if graph.buffers[v.buffer].device == device
        )
        for side in (lambda p: p.reads, lambda p: p.writes)
    )
    return {"all_gather": reads + writes, "reduce_scatter": 2 * reads}.get(task.kind, reads)


def _beside(graph, task):
    """Bytes of a kernel of `torch_ops` while it runs: Adam makes its three results and a root beside what they replace, others one result
    once more."""
    sizes = [graph.buffers[view.buffer].itemsize * volume(view.box) for view in task.writes]
    return sum(sizes) + max(sizes) if graph.ops[task.op].kind == "adam" else max(sizes)


def data_bytes():
    """What counts against RLIMIT_DATA now."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024


def run_capped(job, rank, num_ranks, say):
    from recipes.simulator.two_ranks import Rank  # torch

    device = CLUSTER.nodes[rank][0]
    graph = graph_of(job["model"], job["strategy"])
    for name in WARM:
        Rank(graph_of(name, "single"), CLUSTER.nodes[0][0], 0, alone=True).step()
    ctypes.CDLL(None).malloc_trim(0)
    cap = data_bytes() + int(predicted(job["model"], job["strategy"])[device] * job["share"])
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    try:
        Rank(graph, device, rank).step(last=True)
        say(verdict="fits")
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError) or "allocate" in str(error) or "bad_alloc" in str(error)
        say(verdict="out of memory" if full else "peer gone", error=str(error)[:200])
    os._exit(0)  # a peer may wait for ever
