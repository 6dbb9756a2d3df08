"""Runs an execution graph for real: this process is one rank, torch computes its compute tasks, gloo carries its communications.

A rank walks its tasks in program order. A communication is issued when the walk reaches it and its own inputs are there, and waited for
when somebody reads what it brings (at once, where the run is said not to overlap). So the host behaves as a training framework's does.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from apportion.simulator.execution_graph import COMPUTE
from apportion.simulator.layout import intersect, volume
from recipes.simulator.torch_ops import KERNELS

DTYPES = {4: torch.float32, 8: torch.float64, 1: torch.bool}
SUMS = ("all_reduce", "reduce_scatter")


@contextmanager
def real_time():
    """Threads made here, and calls, are not interrupted by computing.

    A rank has one core. gloo's receiving thread polls a lock that a thread in a call to gloo may hold: where it may interrupt that thread,
    both wait for the scheduler's next tick, 4 ms. Error: PermissionError without the right to real-time priority (CAP_SYS_NICE).
    """
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


PIECE = 2**16  # elements of an all-gather that go at once


def all_gather(parts, mine, group=None):
    """Starts it in pieces; what to wait for.

    One connection carries both ways, and gloo's word that a receiver is ready stands in line behind data. Whole, a long all-gather uses
    both ways or one after the other, by chance.
    """
    pieces = zip(mine.split(PIECE), *(part.split(PIECE) for part in parts), strict=True)
    return All([dist.all_gather(into, piece, group=group, async_op=True) for piece, *into in pieces])


class All:
    """Several messages that are waited for together."""

    def __init__(self, works):
        self.works = works

    def wait(self):
        for work in self.works:
            work.wait()


class Rank:
    """One rank of a graph. arrays: what is there from the start, by tensor name (numpy, whole); None: random. alone: no other runs it."""

    def __init__(self, graph, device, rank, *, overlap=True, arrays=None, group=None, alone=False):
        self.graph, self.device, self.rank, self.overlap, self.group = graph, device, rank, overlap, group
        self.alone = alone or not dist.is_initialized()
        self.tasks = [t for t in graph.tasks if device in t.devices]
        self.members = sorted({d for t in graph.tasks for d in t.devices}, key=lambda d: int(d.split(":")[1]))
        self.held, self.initial, self.pending = {}, {}, {}
        self.peak, self.watch = 0, False  # bytes in tensors; counted only where asked, as counting takes time
        for buffer in graph.buffers:
            if buffer.device == device and not graph.writers.get(buffer.id):
                self.initial[buffer.id] = self._start(buffer, arrays)
        last = {}
        for task in self.tasks:
            for view in (*task.reads, *task.writes):
                last[view.buffer] = task.id
        self.frees = {}
        for buffer, task in last.items():
            if buffer not in graph.kept and graph.buffers[buffer].device == device:
                self.frees.setdefault(task, []).append(buffer)

    def _start(self, buffer, arrays):
        shape = [high - low for low, high in buffer.box]
        if arrays is not None:
            value = torch.from_numpy(np.ascontiguousarray(arrays[buffer.tensor][tuple(slice(*i) for i in buffer.box)]))
            return value if value.dtype in (torch.int32, torch.int64) else value.to(DTYPES[buffer.itemsize])
        if buffer.kind == "input" and buffer.tensor in ("tokens", "labels"):
            return torch.randint(0, 50, shape, dtype=torch.int32)
        if buffer.kind == "weight" and len(shape) > 1:  # activations keep their size: vanishing ones are slow to multiply
            return torch.randn(shape) * (2 * shape[0] / volume(buffer.box)) ** 0.5
        return torch.rand(shape) * 0.01 if buffer.kind == "state" else torch.rand(shape) * 0.5 + 0.5

    def step(self, last=False):
        """One step from the same start; seconds of this rank, with a barrier before. last: nothing is kept to start from again."""
        self.held, self.peak = dict(self.initial), 0
        if last:
            self.initial = {}
        if not self.alone:
            dist.barrier(self.group)
        start = time.perf_counter()
        for task in self.tasks:
            for predecessor in self.graph.predecessors[task.id]:
                self._wait(predecessor)
            if task.kind == COMPUTE or task.stream == COMPUTE:
                self._compute(task)
            else:
                self._send(task)
                if not self.overlap:
                    self._wait(task.id)
            if self.watch:
                self.peak = max(self.peak, sum(t.numel() * t.element_size() for t in self.held.values()))
            for buffer in self.frees.get(task.id, ()):
                if task.id not in self.pending:
                    self.held.pop(buffer, None)
        for task in list(self.pending):
            self._wait(task)
        return time.perf_counter() - start

    def read(self, view):
        buffer = self.graph.buffers[view.buffer]
        value = self.held[view.buffer]
        if view.box == buffer.box:
            return value
        return value[tuple(slice(low - o, high - o) for (low, high), (o, _) in zip(view.box, buffer.box, strict=True))]

    def write(self, view, value):
        buffer = self.graph.buffers[view.buffer]
        if buffer.in_place_of is not None:
            self.held.pop(buffer.in_place_of, None)
        if view.box == buffer.box:
            self.held[view.buffer] = value
            return
        if view.buffer not in self.held:
            self.held[view.buffer] = torch.empty([high - low for low, high in buffer.box], dtype=value.dtype)
        self.read(view).copy_(value)

    def _compute(self, task):
        if task.op is None:  # a copy
            for piece in task.pieces:
                for view in piece.writes:
                    self.write(view, self.read(next(r for r in piece.reads if r.box == view.box)).clone())
            return
        (piece,), op = task.pieces, self.graph.ops[task.op]
        shapes = [tuple(high - low for low, high in view.box) for view in piece.writes]
        with torch.no_grad():
            made = KERNELS[op.kind](op, task.part, [self.read(view) for view in piece.reads], shapes)
        for view, value in zip(piece.writes, made, strict=True):
            self.write(view, value)

    def _mine(self, views):
        return [view for view in views if self.graph.buffers[view.buffer].device == self.device]

    def _send(self, task):
        """Issue; what is to be done when it has arrived is kept until somebody waits."""
        if task.kind == "all_reduce":
            parts = [self.read(self._mine(p.reads)[0]).reshape(-1) for p in task.pieces]
            flat = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            self.pending[task.id] = (work, lambda: self._unpack(task, flat))
        elif task.kind == "reduce_scatter":
            outs = [[next(v for v in p.writes if self.graph.buffers[v.buffer].device == m) for p in task.pieces] for m in self.members]
            whole = [self._mine(p.reads)[0] for p in task.pieces]
            sends = [torch.cat([self._cut(w, v.box).reshape(-1) for w, v in zip(whole, views, strict=True)]) for views in outs]
            got = torch.empty_like(sends[self.rank])
            work = dist.reduce_scatter(got, sends, group=self.group, async_op=True)
            self.pending[task.id] = (work, lambda: self._unpack(task, got))
        elif task.kind == "all_gather":
            ins = [[next(v for v in p.reads if self.graph.buffers[v.buffer].device == m) for p in task.pieces] for m in self.members]
            mine = torch.cat([self.read(v).reshape(-1) for v in ins[self.rank]])
            got = [torch.empty(sum(volume(v.box) for v in views), dtype=mine.dtype) for views in ins]
            self.pending[task.id] = (all_gather(got, mine, self.group), lambda: self._gathered(task, ins, got))
        elif task.kind == "p2p":
            self._pair(task)
        else:
            raise SystemExit(f"no gloo call for {task.kind}")

    def _pair(self, task):
        sends, receives = ([v for p in task.pieces for v in self._mine(side(p))] for side in (lambda p: p.reads, lambda p: p.writes))
        other = next(self.members.index(d) for d in task.devices if d != self.device)
        if sends:
            flat = torch.cat([self.read(v).reshape(-1) for v in sends])
            with real_time():
                work = dist.isend(flat, other, group=self.group, tag=task.id)
            self.pending[task.id] = (work, lambda keep=flat: None)
        else:
            sizes = [volume(v.box) for v in receives]
            dtype = torch.int32 if self.graph.buffers[receives[0].buffer].tensor in ("tokens", "labels") else torch.float32
            flat = torch.empty(sum(sizes), dtype=dtype)
            with real_time():
                work = dist.irecv(flat, other, group=self.group, tag=task.id)
            self.pending[task.id] = (work, lambda: self._unpack(task, flat))

    def _cut(self, view, box):
        value = self.read(view)
        return value[tuple(slice(low - o, high - o) for (low, high), (o, _) in zip(box, view.box, strict=True))]

    def _unpack(self, task, flat):
        at = 0
        for piece in task.pieces:
            for view in self._mine(piece.writes):
                size = volume(view.box)
                self.write(view, flat[at : at + size].reshape([high - low for low, high in view.box]))
                at += size

    def _gathered(self, task, ins, got):
        offsets = [0] * len(got)
        for i, piece in enumerate(task.pieces):
            target = self._mine(piece.writes)[0]
            whole = torch.empty([high - low for low, high in target.box], dtype=got[0].dtype)
            for m, views in enumerate(ins):
                box, size = views[i].box, volume(views[i].box)
                if intersect(box, target.box) is not None:
                    place = tuple(slice(low - o, high - o) for (low, high), (o, _) in zip(box, target.box, strict=True))
                    whole[place] = got[m][offsets[m] : offsets[m] + size].reshape([high - low for low, high in box])
                offsets[m] += size
            self.write(target, whole)

    def _wait(self, task):
        if task in self.pending:
            work, then = self.pending.pop(task)
            work.wait()
            then()
            for buffer in self.frees.get(task, ()):
                self.held.pop(buffer, None)
