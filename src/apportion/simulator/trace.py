"""A result as pictures: a trace for Perfetto (ui.perfetto.dev, or chrome://tracing), and the memory of the fullest device over time."""

from __future__ import annotations

import io
from typing import Any

from apportion.core.errors import Unsupported
from apportion.simulator.run import Result

US = 1e6
LANES = ("compute", "feature", "gradient", "prefetch", "h2d", "d2h")


def perfetto(result: Result) -> dict[str, Any]:
    """The trace event format: a process per device, a thread per stream, one slice per task, memory as a counter. Microseconds."""
    numbers = {device: i for i, device in enumerate(result.graph.devices, 1)}  # Perfetto keeps process and thread 0 for the idle task
    events: list[dict[str, Any]] = []
    for device, pid in numbers.items():
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": device}})
        events += [{"ph": "M", "name": "thread_name", "pid": pid, "tid": t, "args": {"name": lane}} for t, lane in enumerate(LANES, 1)]
    for task in result.graph.tasks:
        begin, end = result.timeline.start[task.id], result.timeline.end[task.id]
        about = {"phase": task.phase, "stage": task.stage, "micro_batch": task.micro_batch, "kind": task.kind, "bytes": task.num_bytes}
        for device in task.devices:
            if device in numbers:
                lane = 1 + LANES.index(task.stream)
                events.append({"ph": "X", "name": task.name, "cat": task.phase, "pid": numbers[device], "tid": lane, "ts": begin * US,
                               "dur": (end - begin) * US, "args": about})  # fmt: skip
    for device, memory in result.memory.items():
        events += [
            {"ph": "C", "name": "memory", "pid": numbers[device], "ts": at * US, "args": {"GB": size / 1e9}} for at, size in memory.curve
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"name": result.name, "seconds": result.seconds}}


def memory_png(result: Result) -> bytes:
    """The curves of all devices, the fullest one in colour with what it holds at its peak. Error: Unsupported without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unsupported("a memory curve needs matplotlib: pip install '.[bench]' in the checkout") from None
    worst = max(result.memory.values(), key=lambda m: m.peak)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for memory in result.memory.values():
        times, sizes = zip(*memory.curve, (result.seconds, memory.curve[-1][1]), strict=True)
        beside = memory.peak - max(sizes)  # context, workspace, communicators, fragmentation
        mine = memory is worst
        axes.step(
            [t * 1e3 for t in times],
            [(size + beside) / 1e9 for size in sizes],
            where="post",
            color="tab:blue" if mine else "0.8",
            zorder=2 + mine,
        )
        if mine:
            axes.axhspan(0, beside / 1e9, color="0.92")
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in worst.categories.items() if size > 0.005 * worst.peak)
    axes.set(ylabel="GB", title=f"{result.name}: {worst.device} peaks at {worst.peak / 1e9:.2f} GB")
    axes.set_xlabel(f"ms of a step\nat the peak, GB: {parts}\ngrey area: what is no tensor; grey lines: other devices", fontsize=8)
    axes.set_xlim(0, result.seconds * 1e3)
    axes.set_ylim(bottom=0)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
