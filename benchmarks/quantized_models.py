"""Whole models in our number formats and the peers', interleaved: in every round each runs the same case once, all others stopped.

    python benchmarks/quantized_models.py [--model bench-250m] [--cases decode-1,decode-8,decode-16,prefill-512] [--rounds 3] [--write]
    python benchmarks/quantized_models.py --model bench-moe --cases moe-decode-1 --theirs q4_0 --write
    python benchmarks/quantized_models.py --cases decode-8k --ours "w4a16,lm_head=w8a16;w4a16,lm_head=w8a16+kv=fp8" --theirs "" --write
    python benchmarks/quantized_models.py --table

Beside every rate stands how the matrices are stored and what their inputs are rounded to; embeddings are bf16 on our side and what the
peer's own quantizer makes of them on its (they are gathered, not read), norms float32. In --theirs a name without an engine is one of
llama.cpp's types. The floor: the bytes of the matrices and cached tokens of a step over the bandwidth measured in the same run. --write
keeps the results and writes the table of docs/quantization.md, as --table does from what was kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.bench.bandwidth import measure_bandwidth
from apportion.bench.make_model import PRESETS, make_model, tensor_shapes
from apportion.core.number_format import NumberFormat

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]
from compare_peers import CASES, MODELS, ROOT, Case, Process, Variant
from pages import write_part
from peers.install import is_installed
from run_all import RESULTS, machine

W4A8 = "int4_g128_bf16@int8_token,lm_head=int6_g128_bf16@int8_token"
OURS = ("bfloat16", "fp8,lm_head=fp8", "int8,lm_head=int8", "w4a16,lm_head=w8a16", W4A8)
STORED = {  # linears, lm_head
    "bfloat16": ("bfloat16", "bfloat16"),
    "fp8,lm_head=fp8": ("e4m3_channel", "e4m3_channel"),
    "int8,lm_head=int8": ("int8_channel", "int8_channel"),
    "w4a16,lm_head=w8a16": ("int4_g128_bf16", "int8_channel"),
    W4A8: ("int4_g128_bf16", "int6_g128_bf16"),
    "bf16": ("bfloat16", "bfloat16"),
    "q8_0": ("int8_g32_f16", "int8_g32_f16"),
    "q4_0": ("int4_g32_f16", "Q6_K"),
    "int8": ("int8_channel_zp_f16", "int8_channel_zp_f16"),
    "int4": ("int4_g128_f16", "int8_channel_zp_f16"),
}
INPUTS = {  # what inputs are rounded to, by each side's own choice
    "bfloat16": "bf16",
    "fp8,lm_head=fp8": "e4m3 per token",
    "int8,lm_head=int8": "int8 per token",
    "w4a16,lm_head=w8a16": "bf16",
    W4A8: "int8 per token",
    "bf16": "bf16",
    "q8_0": "int8 per 32",
    "q4_0": "int8 per 32",
    "int8": "int8 per 32",
    "int4": "int8 per 32",
}
Q6_K_BITS = 6.5625
CASES = CASES | {"decode-8k": Case("bench-250m", 1, 8192, 33, {})}


@dataclass(frozen=True)
class Bar:
    """ours, theirs: engines and dtypes; of theirs the best is taken. least: ratio to reach."""

    title: str
    case: str
    ours: str
    theirs: tuple[str, ...]
    least: float


INT8, INT4_INT8, INT4 = (f"apportion {dtype}" for dtype in ("int8,lm_head=int8", W4A8, "w4a16,lm_head=w8a16"))
Q8, Q4 = ("llama_cpp q8_0", "openvino int8"), ("llama_cpp q4_0", "openvino int4")
BATCHES = (1, 8, 16)
BARS = (
    *(Bar(f"int8 decode, batch {n}", f"decode-{n}", INT8, Q8, least) for n, least in zip(BATCHES, (1.7, 2.5, 1.8), strict=True)),
    *(Bar(f"int4 decode, batch {n}", f"decode-{n}", INT4_INT8, Q4, least) for n, least in zip(BATCHES, (1.6, 2.3, 2.3), strict=True)),
    *(
        Bar(f"the same, inputs in bf16, batch {n}", f"decode-{n}", INT4, Q4, least)
        for n, least in zip(BATCHES, (1.6, 2.3, 2.3), strict=True)
    ),
    Bar("int4 prefill, 512", "prefill-512", INT4_INT8, Q4[:1], 1.3),
    Bar("the same, inputs in bf16", "prefill-512", INT4, Q4[:1], 1.3),
    Bar("fp8 decode, batch 1", "decode-1", "apportion fp8,lm_head=fp8", ("apportion bfloat16",), 1.6),
    Bar("mixture, int4 decode, batch 1", "moe-decode-1", INT4_INT8, Q4[:1], 1.5),
    Bar("the same, inputs in bf16", "moe-decode-1", INT4, Q4[:1], 1.5),
    Bar("fp8 KV, int4 decode at 8k, inputs in bf16", "decode-8k", f"{INT4}+kv=fp8", (INT4,), 1.2),
)


def matrix_bytes(model: str, dtype: str, batch: int = 1) -> float:
    """Of all matrices that a step of `batch` tokens reads; experts as expected when each token picks its own evenly."""
    linears, head = STORED[dtype.partition("+")[0]]
    config = PRESETS[model]
    unpicked = (1 - config["num_experts_per_tok"] / config["num_experts"]) ** batch if "num_experts" in config else 0.0
    total = 0.0
    for name, shape in tensor_shapes(PRESETS[model]):
        if len(shape) == 2 and "embed" not in name:
            stored = head if name.startswith("lm_head") else linears
            bits = Q6_K_BITS if stored == "Q6_K" else NumberFormat.parse(stored).bits_per_weight(*shape)
            total += shape[0] * shape[1] * bits / 8 * (1 - unpicked if ".experts." in name else 1.0)
    return total


def cached_bytes(model: str, dtype: str) -> float:
    """Of the keys and values of one token: 16 bits unless the dtype says otherwise."""
    config = PRESETS[model]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * (1 if dtype.endswith("+kv=fp8") else 2)


def measure(model: str, cases: list[str], ours: list[str], theirs: list[str], rounds: int, threads: int) -> dict[str, Any]:
    variants = [Variant("apportion", dtype, 0, 0) for dtype in ours]
    for name in theirs:
        engine, _, dtype = name.rpartition(" ")
        if is_installed(engine or "llama_cpp"):
            variants.append(Variant(engine or "llama_cpp", dtype, 0, 0))
        else:
            print(f"left out: {name}, not installed by benchmarks/peers/install.py", file=sys.stderr)
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
                nbytes, rate = matrix_bytes(model, dtype, case.batch), statistics.median(values)
                context = case.batch * (case.prompt_len + case.output_len / 2) * cached_bytes(model, dtype)
                floor = None if case.is_prefill else case.batch / bandwidth.floor_s(nbytes + context)
                stored, inputs = STORED[dtype.partition("+")[0]], INPUTS[dtype.partition("+")[0]]
                results["cases"][name][engine] = {
                    "tokens_per_s": rate, "rounds": values, "stored": stored, "inputs": inputs,
                    "matrix_bytes": nbytes, "floor_tokens_per_s": floor,
                }  # fmt: skip
                of_floor = "" if floor is None else f"{rate / floor:6.1%} of the floor"
                print(f"{name:12} {engine:36} {' + '.join(stored):32} {nbytes / 1e6:6.0f} MB {rate:8.1f} tok/s {of_floor}", flush=True)
    finally:
        for process in processes:
            process.end()
    results["bandwidth"] = max(bandwidth, measure_bandwidth(threads), key=lambda measured: measured.best).as_dict()
    return results


def how(name: str) -> str:
    """Stored as, and inputs rounded to, of an engine and dtype."""
    dtype = name.partition(" ")[2].partition("+")[0]
    return f"{' + '.join(STORED[dtype])}; {INPUTS[dtype]}"


def table() -> str:
    """Bars and what was measured, from the newest results of each case."""
    newest: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    kept = [json.loads(path.read_text()) for path in RESULTS.glob("quantized-*.json")]
    for results in sorted(kept, key=lambda results: results["date"]):
        newest |= {case: (results, found) for case, found in results["cases"].items()}
    lines = [
        "| | ours, tok/s (stored; inputs; share of the floor) | best peer, tok/s (stored; inputs) | ratio | to reach | |",
        "|---|---|---|---|---|---|",
    ]
    for bar in BARS:
        found = newest.get(bar.case, ({}, {}))[1]
        theirs = max((name for name in bar.theirs if name in found), key=lambda name: found[name]["tokens_per_s"], default=None)
        if bar.ours not in found or theirs is None:
            lines.append(f"| {bar.title} | | | | {bar.least}x | not measured |")
            continue
        own, other = found[bar.ours], found[theirs]
        floor = own["floor_tokens_per_s"]
        share = "" if floor is None else f"; {own['tokens_per_s'] / floor:.0%}"
        ratio = statistics.median(a / b for a, b in zip(own["rounds"], other["rounds"], strict=True))
        lines.append(
            f"| {bar.title} | {own['tokens_per_s']:.0f} ({how(bar.ours)}{share}) | {theirs.partition(',')[0]} {other['tokens_per_s']:.0f} "
            f"({how(theirs)}) | {ratio:.2f}x | {bar.least}x | {'met' if ratio >= bar.least else 'missed'} |"
        )
    about = {(r["machine"]["processor"], ", ".join(r["machine"]["sets"]), r["commit"]) for r, _ in newest.values()}
    measured = "; ".join(f"{processor} ({sets}), commit {commit}" for processor, sets, commit in sorted(about))
    return f"Two threads, interleaved rounds, medians: {measured}. Stored: linears + output projection.\n\n" + "\n".join(lines)


def write_page() -> None:
    write_part(ROOT / "docs" / "quantization.md", "speed", "benchmarks/quantized_models.py", table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bench-250m")
    parser.add_argument("--cases", default="decode-1,decode-8,decode-16,prefill-512")
    parser.add_argument("--ours", default=";".join(OURS), help="separated by semicolons")
    parser.add_argument("--theirs", default="q8_0,q4_0,openvino int8,openvino int4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results, and write the page's table")
    parser.add_argument("--table", action="store_true", help="write the page's table from what was kept, and measure nothing")
    args = parser.parse_args()
    if args.table:
        return write_page()
    theirs = [dtype for dtype in args.theirs.split(",") if dtype]
    results = measure(args.model, args.cases.split(","), args.ours.split(";"), theirs, args.rounds, args.threads)
    if args.write:
        today = datetime.date.today().isoformat()
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        about = {"machine": machine(), "date": today, "commit": commit, "command": " ".join(["python", *sys.argv])}
        path = RESULTS / f"quantized-{args.model}-{'-'.join(args.cases.split(','))}-{today}.json"
        path.write_text(json.dumps(about | results, indent=1) + "\n")
        write_page()


if __name__ == "__main__":
    main()
