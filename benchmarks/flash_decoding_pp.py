"""FlashDecoding++ here: decode attention under a unified maximum against online, the flat GEMM against torch, dispatch on held-out rows.

python benchmarks/flash_decoding_pp.py -o benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apportion.bench.kernels import make_ops
from apportion.core.kv_spec import UNIT_BYTES, KVGroupSpec, kv_format
from apportion.evaluate.linear_profile import intervals, measure
from apportion.kernels.interval_table import GEMV
from apportion.kernels.ops import AttentionSpec, LinearSpec, Ops
from apportion.platforms.cpu import processor_name
from apportion.platforms.platform import select_platform

CONTEXTS = (1024, 4096, 16384)
SHAPES = {  # of bench-250m: qkv, o, gate and up, down
    "qkv_proj": (1536, 1024), "o_proj": (1024, 1024), "gate_up_proj": (5632, 1024), "down_proj": (1024, 2816),
}  # fmt: skip
KNOWN, HELD_OUT = (1, 2, 3, 4, 6, 8, 12, 16), (5, 7, 10, 11)
NUM_LAYERS = 4  # in turn, so that a layer's KV is not in a cache again
ROUNDS = 15


def attention_pair(ops: Ops, num_requests: int, context_len: int) -> tuple[Callable[[], None], Callable[[], None], Any]:
    """(online, unified) decode attention of all layers (16 heads over 4 KV heads of 64, bf16), and the kernel."""
    kv = KVGroupSpec(tuple(range(NUM_LAYERS)), 4, 64, 64, kv_format("bfloat16"), 32)
    blocks = -(-context_len // kv.block_size)
    arena = select_platform("cpu").create_arena(num_requests * blocks * kv.block_bytes)
    arena.tensor.view(torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0))
    table = torch.randperm(num_requests * blocks, generator=torch.Generator().manual_seed(0)).int() * (kv.block_bytes // UNIT_BYTES)
    table = table.view(num_requests, blocks).contiguous()
    starts, lens = torch.arange(num_requests + 1).int(), torch.full((num_requests,), context_len).int()
    qkv, out = torch.randn(num_requests, 24 * 64), torch.empty(num_requests, 16 * 64)
    calls, kernels = [], []
    for unified in (False, True):
        attention = ops.paged_attention(AttentionSpec(16, kv, 0.125, 64), arena.tensor)
        for layer in kv.layers:
            attention.unify(kv.layer_offset(layer), torch.zeros(16) if unified else None)
        handle = attention.plan(starts, lens, table, num_requests, num_requests)

        def step(attention: Any = attention, handle: Any = handle) -> None:
            for layer in kv.layers:
                attention.run(kv.layer_offset(layer), qkv, out, handle)

        calls.append(step)
        kernels.append(attention)
    return calls[0], calls[1], (arena, kernels[1], (starts, lens, table))  # plans hold addresses


def compare(one: Callable[[], None], two: Callable[[], None]) -> tuple[float, float]:
    """Median microseconds of each, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(ROUNDS + 1):
        for call, found in zip((one, two) if round_ % 2 else (two, one), times if round_ % 2 else times[::-1], strict=True):
            start = time.perf_counter()
            call()
            if round_:
                found.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


def attention(num_threads: int) -> list[dict[str, Any]]:
    ops, rows = make_ops(num_threads), []
    for num_requests in (1, 4):
        for context_len in CONTEXTS:
            online, unified, (arena, kernel, held) = attention_pair(ops, num_requests, context_len)
            online_us, unified_us = compare(online, unified)
            rows.append(
                {
                    "threads": num_threads, "requests": num_requests, "context": context_len, "online_us": online_us / NUM_LAYERS,
                    "unified_us": unified_us / NUM_LAYERS, "speedup": online_us / unified_us, "recomputed": kernel.recomputed,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
            del kernel, held
            arena.close()
    return rows


def linears(num_threads: int) -> list[dict[str, Any]]:
    ops, rows = make_ops(num_threads), []
    for name, (n, c) in SHAPES.items():
        torch.set_num_threads(num_threads)
        times = measure(ops, LinearSpec(n, c, "bfloat16"), tokens=sorted({*KNOWN, *HELD_OUT}), rounds=5)
        known = intervals({t: times[t] for t in KNOWN})
        for t, us in times.items():
            chosen = us["gemv"] if known.at(t) == GEMV and "gemv" in us else us["flat"]
            best = min(us["flat"], us.get("gemv", us["flat"]))
            rows.append(
                {"name": name, "n": n, "c": c, "tokens": t, "us": us, "chosen_us": chosen, "best_us": best, "held_out": t in HELD_OUT}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--parts", nargs="+", default=["attention", "linear"], choices=["attention", "linear"])
    args = parser.parse_args()
    cores = select_platform("cpu").num_cores
    found: dict[str, Any] = {
        "machine": {"processor": processor_name(), "cores": cores},
        "command": "python benchmarks/flash_decoding_pp.py",
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
    }
    if "attention" in args.parts:
        rows = found["attention"] = [row for threads in sorted({1, cores}) for row in attention(threads)]
        found["unified_slowest"] = min(row["speedup"] for row in rows)
        found["unified_from_4k"] = min(row["speedup"] for row in rows if row["threads"] == cores and row["context"] >= 4096)
    if "linear" in args.parts:
        rows = found["linear"] = linears(cores)
        few = [row["us"]["library"] / row["chosen_us"] for row in rows if 4 <= row["tokens"] <= 16]
        found["flat_over_torch_float32_4_to_16"] = statistics.geometric_mean(few)
        found["dispatch_worst_held_out"] = max(row["chosen_us"] / row["best_us"] for row in rows if row["held_out"])
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"{name:34} {value}")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
