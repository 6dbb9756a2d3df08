"""What one process does for recipes/validate_simulator.py: time operators, messages or whole steps; one JSON line for each."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import threading
import time

import torch
import torch.distributed as dist

from recipes.simulator.cases import CLUSTER, STRATEGIES, graph_of
from recipes.simulator.predict import signatures
from recipes.simulator.torch_ops import KERNELS
from recipes.simulator.two_ranks import Rank

KINDS = ("all_reduce", "reduce_scatter", "all_gather", "p2p")
CACHE = 48 * 2**20  # bytes that a rotation of inputs is to exceed


def work(job, rank, num_ranks):
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    torch.set_flush_denormal(True)
    if num_ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    {"operators": operators, "messages": messages, "steps": steps}[job["kind"]](job, rank, num_ranks)
    if num_ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0


def say(**line):
    print(json.dumps(line), flush=True)


def operators(job, rank, num_ranks):
    """Each operator with inputs that are not in the cache, both ranks at the same time."""
    known = set(job["known"])
    for key, (op, part, shapes, outs) in signatures([tuple(g) for g in job["graphs"]]).items():
        if key in known:
            continue
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
                if len(times) >= 60 or (len(times) >= 6 and time.perf_counter() - begun > 0.03):
                    break
        say(key=key, seconds=statistics.median(times[2:]))


def _random(op, i, shape):
    name = op.inputs[i].tensor
    if name in ("tokens", "labels"):
        return torch.randint(0, 50, shape, dtype=torch.int32)
    return torch.rand(shape) * 0.1


def messages(job, rank, num_ranks):
    """Seconds of each collective at each size, and how much a large one and computing slow each other down."""
    sizes = [2**i for i in range(10, 26, 2)]
    for kind, size in itertools.product(KINDS, sizes):
        times, begun = [], time.perf_counter()
        while True:
            dist.barrier()
            start = time.perf_counter()
            _message(kind, size, rank)
            times.append(time.perf_counter() - start)
            done = torch.tensor([len(times) >= 3 and (time.perf_counter() - begun > 0.1 or len(times) >= 40)])
            dist.broadcast(done, 0)  # the first rank decides
            if done:
                break
        say(key=f"{kind} {size}", value=statistics.median(times[1:]))
    for name, value in _gamma(2**22, rank).items():
        say(key=name, value=value)


def _message(kind, size, rank):
    x = torch.ones(size // 4)
    if kind == "all_reduce":
        dist.all_reduce(x)
    elif kind == "reduce_scatter":
        dist.reduce_scatter(torch.empty(size // 8), [x[: size // 8], x[size // 8 :]])
    elif kind == "all_gather":
        dist.all_gather([torch.empty(size // 8), torch.empty(size // 8)], x[: size // 8])
    elif rank == 0:
        dist.send(x, 1)
    else:
        dist.recv(x, 0)


def _gamma(size, rank):
    """Relative slow-downs of a product and of an all-reduce that run at the same time."""
    a = torch.rand(512, 512)

    def products(count):
        start = time.perf_counter()
        for _ in range(count):
            a @ a
        return (time.perf_counter() - start) / count

    def reductions(count):
        start = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(torch.ones(size // 4))
        return (time.perf_counter() - start) / count

    products(5)
    dist.barrier()
    product = products(60)
    dist.barrier()
    reduction = reductions(4)
    count = torch.tensor([max(4, int(0.8 / reduction))])
    dist.broadcast(count, 0)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(reductions(int(count))))
    dist.barrier()
    thread.start()
    slow = []
    while thread.is_alive():
        slow.append(products(3))
    thread.join()
    dist.barrier()
    return {"gamma compute": max(0.0, statistics.median(slow) / product - 1), "gamma message": max(0.0, seen[0] / reduction - 1)}


def steps(job, rank, num_ranks):
    """Whole steps of each case, until the seconds are over; the first rank decides."""
    begun = time.perf_counter()
    for model, strategy, link in job["cases"]:
        go = torch.tensor([time.perf_counter() - begun < job["seconds"]])
        if num_ranks > 1:
            dist.broadcast(go, 0)
        if not go:
            return
        graph = graph_of(model, strategy)
        mine = Rank(graph, CLUSTER.nodes[rank][0], rank, overlap=STRATEGIES[strategy].get("overlap", True))
        mine.watch = True
        mine.step()
        peak, mine.watch = mine.peak, False
        first = min(mine.step() for _ in range(3))  # the heap has grown to what a step needs
        count = torch.tensor([max(3, min(20, int(0.5 / first)))])
        if num_ranks > 1:
            dist.broadcast(count, 0)
        times = [mine.step() for _ in range(int(count))]
        say(case=f"{model} {strategy} {link}", times=times, peak=peak)
        print(f"{rank} {model} {strategy} {link} {statistics.median(times) * 1e3:.1f} ms", file=sys.stderr)
