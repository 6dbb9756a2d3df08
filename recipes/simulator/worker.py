"""What one process does for recipes/validate_simulator.py: time operators, messages or whole steps; one JSON line for each."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time

import torch
import torch.distributed as dist

from recipes.simulator.capped import run_capped
from recipes.simulator.cases import CLUSTER, STRATEGIES, graph_of
from recipes.simulator.predict import SIZES, signatures
from recipes.simulator.torch_ops import KERNELS
from recipes.simulator.two_ranks import Rank, all_gather, real_time

KINDS = ("all_reduce", "reduce_scatter", "all_gather", "p2p")
CACHE = 48 * 2**20  # bytes that a rotation of inputs is to exceed


def work(job, rank, num_ranks):
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    torch.set_flush_denormal(True)
    if num_ranks > 1:
        with real_time():
            dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    if job["kind"] == "capped":
        return run_capped(job, rank, num_ranks, say)
    {"operators": operators, "messages": messages, "steps": steps}[job["kind"]](job, rank, num_ranks)
    if num_ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0


def say(**line):
    print(json.dumps(line), flush=True)


def operators(job, rank, num_ranks):
    """Each operator with inputs that are not in the cache, both ranks at the same time."""
    for key, (op, part, shapes, outs) in signatures([tuple(g) for g in job["graphs"]]).items():
        size = 4 * sum(torch.Size(s).numel() for s in (*shapes, *outs))
        copies = max(1, min(8, CACHE // max(size, 1)))
        inputs = [[_random(op, i, s) for i, s in enumerate(shapes)] for _ in range(copies)]
        if num_ranks > 1:
            dist.barrier()
        times, begun = [], time.perf_counter()
        with torch.no_grad():
            for xs in itertools.cycle(inputs):
                start = time.perf_counter()
                KERNELS[op.kind](op, part, xs, outs)
                times.append(time.perf_counter() - start)
                if len(times) >= 60 or (len(times) >= 6 and time.perf_counter() - begun > 0.02):
                    break
        say(key=key, seconds=statistics.median(times[2:]))


def _random(op, i, shape):
    name = op.inputs[i].tensor
    if name in ("tokens", "labels"):
        return torch.randint(0, 50, shape, dtype=torch.int32)
    return torch.rand(shape) * 0.1


def messages(job, rank, num_ranks):
    """Seconds of each collective at each size, of copies, of starting a message; how much messages and computing slow each other."""
    for size in SIZES:
        halves, out = [torch.ones(size // 8)] * 2, torch.empty(size // 4)
        say(key=f"copy {size}", value=_per_call(lambda halves=halves, out=out: torch.cat(halves, out=out), 0.02))
    for kind, size in itertools.product(KINDS, SIZES):
        if size > 2**24 and job["slow"]:
            continue
        send = _message(kind, size, rank)
        say(key=f"{kind} {size}", value=_per_call(lambda send=send: send().wait(), 0.15))
    say(key="issue", value=_issue(_message("all_reduce", SIZES[0], rank)))
    for name, value in _gamma(rank).items():
        say(key=name, value=value)


def _per_call(call, seconds):
    """Of calls one after another, the same number on both ranks."""
    call()
    dist.barrier()
    start = time.perf_counter()
    call()
    count = _agreed(max(2, min(100, seconds / (time.perf_counter() - start))))
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _agreed(number):
    """The first rank's."""
    shared = torch.tensor([int(number)])
    if dist.is_initialized():
        dist.broadcast(shared, 0)
    return int(shared)


def _message(kind, size, rank):
    """A function that starts the message and answers what to wait for."""
    x, half = torch.zeros(size // 4), torch.zeros(size // 8)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(x, async_op=True)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter(half, [x[: size // 8], x[size // 8 :]], async_op=True)
    if kind == "all_gather":
        return lambda: all_gather([x[: size // 8], x[size // 8 :]], half)

    def pair():
        with real_time():
            return dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)

    return pair


def _issue(send):
    """Seconds of a call that starts a message."""
    times = []
    for _ in range(50):
        start = time.perf_counter()
        work = send()
        times.append(time.perf_counter() - start)
        work.wait()
    return statistics.median(times)


def _gamma(rank, size=2**22):
    """Relative slow-downs of products and of all-reduces that run at the same time."""
    a, send = torch.rand(256, 256), _message("all_reduce", size, rank)
    product = _per_call(lambda: a @ a, 0.1)

    def flood(count, meanwhile):
        """Seconds until `count` messages are through."""
        dist.barrier()
        start = time.perf_counter()
        works = [send() for _ in range(count)]
        while meanwhile and not works[-1].is_completed():
            meanwhile()
        for work in works:
            work.wait()
        return time.perf_counter() - start

    count = _agreed(max(4, 0.4 / (flood(4, None) / 4)))
    alone, products = flood(count, None), itertools.count()
    beside = flood(count, lambda: (a @ a, next(products)))
    return {
        "gamma compute": max(0.0, beside / (max(1, next(products)) * product) - 1),
        "gamma message": max(0.0, beside / alone - 1),
    }


def steps(job, rank, num_ranks):
    """Whole steps of each case, until the seconds are over; the first rank decides."""
    begun = time.perf_counter()
    for model, strategy, link in job["cases"]:
        if not _agreed(time.perf_counter() - begun < job["seconds"]):
            return
        graph = graph_of(model, strategy)
        mine = Rank(graph, CLUSTER.nodes[rank][0], rank, overlap=STRATEGIES[strategy].get("overlap", True))
        mine.watch = True
        mine.step()
        peak, mine.watch = mine.peak, False
        first = min(mine.step() for _ in range(2))  # the heap has grown to what a step needs
        times = [mine.step() for _ in range(_agreed(max(3, min(20, 0.4 / first))))]
        say(case=f"{model} {strategy} {link}", times=times, peak=peak)
        print(f"{rank} {model} {strategy} {link} {statistics.median(times) * 1e3:.1f} ms", file=sys.stderr)
