"""Layer-major against block-major KV: is a block better cut per layer (each layer its own pool) or for all layers of a group?

    python benchmarks/kv_layout.py [--threads 2] [--rounds 7] [--write]

Decodes one token of one request with the project's own kernel, layer after layer, as a step does: 16 layers, 16 heads over 4 kv heads
of 64, bfloat16, 4k and 32k tokens of context. The same kernel runs both: in block-major a block holds 32 tokens of all layers, in
layer-major each layer has blocks of its own 32 tokens in a pool of its own. Blocks are handed out in random order; requests
rotate so that no cache holds the context. Rounds are interleaved; medians are reported, beside the read bandwidth of the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from apportion.bench.bandwidth import measure_bandwidth
from apportion.core.kv_spec import UNIT_BYTES, KVGroupSpec, kv_format
from apportion.kernels.cpu import extension
from apportion.kernels.cpu.attention import PagedAttention
from apportion.kernels.ops import AttentionSpec
from apportion.platforms.arena import Arena

sys.path.insert(0, str(Path(__file__).parent))
from run_all import machine

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 16, 16, 4, 64, 32
TOTAL_BYTES = 1 << 30


class Cache:
    """One request after another of `context` tokens, in one of the two layouts; both fill the same number of bytes."""

    def __init__(self, team: object, context: int, layers_per_block: int) -> None:
        layers = tuple(range(layers_per_block))
        self.group = KVGroupSpec(layers, KV_HEADS, DIM, DIM, kv_format("bfloat16"), BLOCK)
        self.pools = LAYERS // layers_per_block
        self.blocks = context // BLOCK
        self.requests = max(1, TOTAL_BYTES // (self.blocks * self.group.block_bytes * self.pools))
        per_pool = self.blocks * self.requests
        self.arena = Arena.create(per_pool * self.pools * self.group.block_bytes, shared=False)
        values = torch.randn(1 << 22).bfloat16().view(torch.uint8)
        for piece in self.arena.tensor.split(len(values)):
            piece.copy_(values[: len(piece)])
        self.kernel = PagedAttention(team, AttentionSpec(HEADS, self.group, DIM**-0.5, DIM), self.arena.tensor)
        units = self.group.block_bytes // UNIT_BYTES
        orders = [(torch.randperm(per_pool) + pool * per_pool).mul(units).int() for pool in range(self.pools)]
        self.tables = [o.view(self.requests, 1, self.blocks) for o in orders]
        self.starts, self.lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
        self.qkv, self.out = torch.randn(1, (HEADS + 2 * KV_HEADS) * DIM), torch.empty(1, HEADS * DIM)
        self.next = 0

    @property
    def step_bytes(self) -> int:
        return self.blocks * self.group.block_bytes * self.pools

    def step(self) -> float:
        """Seconds of attention of one decode step."""
        request, self.next = self.next, (self.next + 1) % self.requests
        plans = [self.kernel.plan(self.starts, self.lens, table[request], 1, 1) for table in self.tables]
        start = time.perf_counter()
        for plan in plans:
            for layer in self.group.layers:
                self.kernel.run(self.group.layer_offset(layer), self.qkv, self.out, plan)
        return time.perf_counter() - start


def compare(context: int, threads: int, rounds: int) -> dict[str, float]:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    team = extension.load().ThreadTeam(threads, cores)
    os.sched_setaffinity(0, cores[:1])
    caches = {"block_major": Cache(team, context, LAYERS), "layer_major": Cache(team, context, 1)}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(rounds):
        for name, cache in caches.items():
            times[name] += [cache.step() for _ in range(cache.requests)]
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    result = {f"{name}_ms": statistics.median(t) * 1e3 for name, t in times.items()}
    return result | {f"{name}_gb_s": cache.step_bytes / result[f"{name}_ms"] / 1e6 for name, cache in caches.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kv_layout-DATE.json")
    options = parser.parse_args()
    report = {
        "command": f"python benchmarks/kv_layout.py --threads {options.threads} --rounds {options.rounds}",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "isa": extension.load().features()["isa"],
        "shape": {"layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": "bfloat16", "block_size": BLOCK},
        "read_bandwidth": measure_bandwidth(options.threads).as_dict(),
        "contexts": {str(context): compare(context, options.threads, options.rounds) for context in (4096, 32768)},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.write:
        path = Path(__file__).parent / "results" / f"kv_layout-{report['date']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
