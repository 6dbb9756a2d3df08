"""Whole models in our number formats and llama.cpp's, interleaved: in every round each runs the same case once, all others stopped.

    python benchmarks/quantized_models.py [--model bench-250m] [--cases decode-1,decode-8,decode-16,prefill-512] [--rounds 3] [--write]

Beside every rate stands how the matrices are stored; embeddings are bf16 on our side and what llama.cpp's own quantizer makes of them on
its (they are gathered, not read), norms float32. The floor: the bytes of all matrices over the bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from apportion.bench.bandwidth import measure_bandwidth
from apportion.bench.make_model import PRESETS, make_model, tensor_shapes
from apportion.core.number_format import NumberFormat

sys.path.insert(0, str(Path(__file__).parent))
from compare_peers import CASES, MODELS, ROOT, Process, Variant
from run_all import machine

OURS = (
    "bfloat16",
    "fp8",
    "fp8,lm_head=e4m3_channel",
    "int8,lm_head=int8",
    "w8a16,lm_head=w8a16",
    "w4a16,lm_head=w8a16",
    "w4a16,lm_head=w4a16",
)
STORED = {  # linears, lm_head
    "bfloat16": ("bfloat16", "bfloat16"),
    "fp8": ("e4m3_channel", "bfloat16"),
    "fp8,lm_head=e4m3_channel": ("e4m3_channel", "e4m3_channel"),
    "int8,lm_head=int8": ("int8_channel", "int8_channel"),
    "w8a16,lm_head=w8a16": ("int8_channel", "int8_channel"),
    "w4a16,lm_head=w8a16": ("int4_g128_bf16", "int8_channel"),
    "w4a16,lm_head=w4a16": ("int4_g128_bf16", "int4_g128_bf16"),
    "bf16": ("bfloat16", "bfloat16"),
    "q8_0": ("int8_g32_f16", "int8_g32_f16"),
    "q4_0": ("int4_g32_f16", "Q6_K"),
}
Q6_K_BITS = 6.5625


def matrix_bytes(model: str, dtype: str) -> float:
    """Of all matrices that a token of a dense model is multiplied by."""
    linears, head = STORED[dtype]
    total = 0.0
    for name, shape in tensor_shapes(PRESETS[model]):
        if len(shape) == 2 and "embed" not in name:
            stored = head if name.startswith("lm_head") else linears
            bits = Q6_K_BITS if stored == "Q6_K" else NumberFormat.parse(stored).bits_per_weight(*shape)
            total += shape[0] * shape[1] * bits / 8
    return total


def measure(model: str, cases: list[str], ours: list[str], theirs: list[str], rounds: int, threads: int) -> dict[str, Any]:
    variants = [Variant("apportion", dtype, 0, 0) for dtype in ours] + [Variant("llama_cpp", dtype, 0, 0) for dtype in theirs]
    if not (MODELS / model / "model.safetensors").exists():
        make_model(model, MODELS / model)
    bandwidth = measure_bandwidth(threads)
    processes = [Process.start(v, model, threads, MODELS / f"{model}-{v.engine}-{v.dtype.replace(',', '-')}.log") for v in variants]
    results: dict[str, Any] = {"model": model, "threads": threads, "rounds": rounds, "cases": {}}
    try:
        for case in (CASES[name] for name in cases):
            rates: dict[str, list[float]] = {f"{p.variant.engine} {p.variant.dtype}": [] for p in processes}
            for number in range(rounds):
                turn = number % len(processes)
                for process in processes[turn:] + processes[:turn]:
                    answer = process.run(case, min(case.output_len, 65), seed=100 + number)
                    rates[f"{process.variant.engine} {process.variant.dtype}"].append(case.tokens_per_s(answer))
            name = next(n for n, c in CASES.items() if c is case)
            results["cases"][name] = {}
            for engine, values in rates.items():
                dtype = engine.partition(" ")[2]
                nbytes, rate = matrix_bytes(model, dtype), statistics.median(values)
                floor = None if case.is_prefill else case.batch / bandwidth.floor_s(nbytes)
                results["cases"][name][engine] = {"tokens_per_s": rate, "rounds": values, "stored": STORED[dtype], "matrix_bytes": nbytes}
                of_floor = "" if floor is None else f"{rate / floor:6.1%} of the floor"
                print(
                    f"{name:12} {engine:36} {' + '.join(STORED[dtype]):32} {nbytes / 1e6:6.0f} MB {rate:8.1f} tok/s {of_floor}", flush=True
                )
    finally:
        for process in processes:
            process.end()
    results["bandwidth"] = max(bandwidth, measure_bandwidth(threads), key=lambda measured: measured.best).as_dict()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bench-250m")
    parser.add_argument("--cases", default="decode-1,decode-8,decode-16,prefill-512")
    parser.add_argument("--ours", default=";".join(OURS), help="separated by semicolons")
    parser.add_argument("--theirs", default="q8_0,q4_0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    args = parser.parse_args()
    theirs = [dtype for dtype in args.theirs.split(",") if dtype]
    results = measure(args.model, args.cases.split(","), args.ours.split(";"), theirs, args.rounds, args.threads)
    if args.write:
        today = datetime.date.today().isoformat()
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        about = {"machine": machine(), "date": today, "commit": commit, "command": " ".join(["python", *sys.argv])}
        path = ROOT / "benchmarks" / "results" / f"quantized-{args.model}-{today}.json"
        path.write_text(json.dumps(about | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
