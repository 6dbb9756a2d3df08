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
from apportion.evaluate.linear_profile import TOKENS, learn, measure
from apportion.kernels.ops import AttentionSpec, LinearSpec, Ops
from apportion.platforms.cpu import processor_name
from apportion.platforms.platform import select_platform

CONTEXTS = (1024, 4096, 16384)
SHAPES = {  # of bench-250m: qkv, o, gate and up, down
    "qkv_proj": (1536, 1024), "o_proj": (1024, 1024), "gate_up_proj": (5632, 1024), "down_proj": (1024, 2816),
}  # fmt: skip
SCHEMES = ("bfloat16", "float16", "float32", "e4m3_channel@e4m3_token", "int4_g128")  # with two ways on avx512bf16
HELD_OUT = (5, 7, 10, 11, 20, 28)  # measured apart, after the rule was learned
NUM_LAYERS = 4  # in turn, so that a layer's KV is not in a cache again
SECONDS = 0.5  # of a comparison


def attention_ways(ops: Ops, num_requests: int, context_len: int) -> tuple[dict[str, Callable[[], None]], Any]:
    """Decode attention of all layers (16 heads over 4 KV heads of 64, bf16): online, the same again, unified; and what they read."""
    kv = KVGroupSpec(tuple(range(NUM_LAYERS)), 4, 64, 64, kv_format("bfloat16"), 32)
    blocks = -(-context_len // kv.block_size)
    arena = select_platform("cpu").create_arena(num_requests * blocks * kv.block_bytes)
    arena.tensor.view(torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0))
    table = torch.randperm(num_requests * blocks, generator=torch.Generator().manual_seed(0)).int() * (kv.block_bytes // UNIT_BYTES)
    table = table.view(num_requests, blocks).contiguous()
    starts, lens = torch.arange(num_requests + 1).int(), torch.full((num_requests,), context_len).int()
    qkv, out = torch.randn(num_requests, 24 * 64), torch.empty(num_requests, 16 * 64)
    calls, kernels = {}, []
    for name in ("online", "again", "unified"):
        attention = ops.paged_attention(AttentionSpec(16, kv, 0.125, 64), arena.tensor)
        for layer in kv.layers:
            attention.unify(kv.layer_offset(layer), torch.zeros(16) if name == "unified" else None)
        handle = attention.plan(starts, lens, table, num_requests, num_requests)

        def step(attention: Any = attention, handle: Any = handle) -> None:
            for layer in kv.layers:
                attention.run(kv.layer_offset(layer), qkv, out, handle)

        calls[name] = step
        kernels.append(attention)
    return calls, (arena, kernels, (starts, lens, table))  # plans hold addresses


def compare(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median microseconds of each, in turns, each turn begun by another one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), 0.0
    while not end or time.perf_counter() < end:
        for name in names:
            start = time.perf_counter()
            calls[name]()
            if end:
                times[name].append((time.perf_counter() - start) * 1e6)
        names = names[1:] + names[:1]
        end = end or time.perf_counter() + SECONDS
    return {name: statistics.median(found) for name, found in times.items()}


def attention(num_threads: int) -> list[dict[str, Any]]:
    ops, rows = make_ops(num_threads), []
    for num_requests in (1, 4):
        for context_len in CONTEXTS:
            calls, (arena, kernels, held) = attention_ways(ops, num_requests, context_len)
            us = compare(calls)
            rows.append(
                {
                    "threads": num_threads, "requests": num_requests, "context": context_len, "online_us": us["online"] / NUM_LAYERS,
                    "unified_us": us["unified"] / NUM_LAYERS, "speedup": us["online"] / us["unified"],
                    "same_against_itself": us["online"] / us["again"], "recomputed": kernels[-1].recomputed,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
            del calls, kernels, held
            arena.close()
    return rows


def linears(num_threads: int) -> list[dict[str, Any]]:
    """What dispatch learns from a few numbers of rows, then every number timed apart: what it chooses against the best way."""
    ops, rows = make_ops(num_threads), []
    torch.set_num_threads(num_threads)
    for scheme in SCHEMES:
        for name, (n, c) in SHAPES.items():
            spec = LinearSpec(n, c, scheme)
            rule = learn(lambda tokens, spec=spec: measure(ops, spec, tokens, library=False), [t for t in TOKENS if t <= 48])
            for t, us in measure(ops, spec, sorted({*HELD_OUT, *TOKENS[:9]}), library=scheme == "bfloat16").items():
                chosen, best = us[rule.at(t).kernel], min(us["flat"], us.get("gemv", us["flat"]))
                held_out = t in HELD_OUT and str(t) not in rule.us and "gemv" in us  # else there is nothing to choose
                rows.append(
                    {
                        "scheme": scheme, "name": name, "n": n, "c": c, "tokens": t, "us": us, "chosen": rule.at(t).kernel,
                        "chosen_us": chosen, "best_us": best, "held_out": held_out,
                    }
                )  # fmt: skip
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
        few = [row["us"]["library"] / row["chosen_us"] for row in rows if 4 <= row["tokens"] <= 16 and "library" in row["us"]]
        found["bfloat16_over_torch_float32_4_to_16"] = statistics.geometric_mean(few)
        losses = [row["chosen_us"] / row["best_us"] for row in rows if row["held_out"]]
        found["dispatch_held_out_cells"] = len(losses)
        found["dispatch_within_5_percent"] = sum(loss <= 1.05 for loss in losses)
        found["dispatch_worst_held_out"] = max(losses)
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"{name:34} {value}")
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
