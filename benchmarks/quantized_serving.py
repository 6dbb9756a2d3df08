"""The experiment of vLLM's post on FP8 on a CPU: one memory cap for weights and KV cache, a rising request rate, fewer bits.

    python benchmarks/quantized_serving.py [--cap 512M] [--rates 0.5,1.5,3] [--seconds 12] [--write]

Every variant serves bench-250m and is asked by `apportion bench serve` (Poisson arrivals, random prompts) at each rate. What its weights
leave of the cap is its KV cache: fewer bits, more requests at once. Static scales are calibrated on random tokens, for speed alone.
With --write the figures go to benchmarks/results, and into the table of docs/quantization.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from apportion import quantize
from apportion.bench.make_model import make_model
from apportion.cli.flags import parse_bytes
from apportion.core.config import ModelConfig
from apportion.engine.build import read_model

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
from pages import write_part  # noqa: E402
from run_all import RESULTS, machine  # noqa: E402
from serving import served  # noqa: E402

MODEL = ROOT / ".cache" / "bench" / "bench-250m"
STATIC = MODEL.with_name("bench-250m-fp8-static")
VARIANTS: dict[str, dict[str, Any]] = {  # keywords of a server
    "bfloat16": {},
    "fp8 weights, dynamic": {"quantization": "fp8"},
    "fp8 weights, static": {"model": STATIC},
    "fp8 weights, dynamic, fp8 KV": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
METRICS = (
    "output_throughput",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_itl_ms",
    "p99_itl_ms",
    "max_concurrent_requests",
    "completed",
    "failed",
)


def kv_bytes_under(cap: int, keywords: dict[str, Any]) -> int:
    spec = read_model(ModelConfig(model=str(keywords.get("model", MODEL)), quantization=keywords.get("quantization")))[1]
    return cap - spec.weight_bytes()


def load(port: int, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """What `apportion bench serve` found at one rate."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "bench", "serve", "--port", str(port), "--request-rate", str(rate), "--num-prompts", str(max(4, round(rate * args.seconds))),
            "--input-len", str(args.input_len), "--output-len", str(args.output_len), "--num-warmups", "1", "--ignore-eos",
            "--quiet", "-o", folder,
        ]  # fmt: skip
        subprocess.run(["nice", sys.executable, "-m", "apportion.cli.main", *command], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / "result.json").read_text())
    return {name: found[name] for name in METRICS}


def table(results: dict[str, Any]) -> str:
    machine, rows = results["machine"], results["rows"]
    sets = ", ".join(machine["sets"])
    load = f"prompts of {results['input_len']} tokens, answers of {results['output_len']}, {results['seconds']:g} s of arrivals"
    lines = [
        f"{results['cap'] / 2**20:.0f} MiB for weights and KV cache; {load}; {machine['processor']} ({sets}), commit {machine['commit']}.",
        "",
        "| | KV cache, MB | requests/s | output, tok/s | TTFT, ms: mean (p99) | ITL, ms: mean (p99) | at once |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = (f"{row[f'mean_{name}_ms']:,.0f} ({row[f'p99_{name}_ms']:,.0f})" for name in ("ttft", "itl"))
        lines.append(
            f"| {row['variant']} | {row['kv_bytes'] / 1e6:.0f} | {row['rate']:g} | {row['output_throughput']:.0f} | {' | '.join(times)} | "
            f"{row['max_concurrent_requests']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap", type=parse_bytes, default="512M", help="bytes of weights and KV cache together")
    parser.add_argument("--rates", default="0.5,1.5,3", help="requests a second")
    parser.add_argument("--seconds", type=float, default=12, help="of arrivals at each rate")
    parser.add_argument("--input-len", type=int, default=384)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    args = parser.parse_args()
    if not (MODEL / "model.safetensors").exists():
        make_model("bench-250m", MODEL)
    names = args.variants.split(";")
    if any("model" in VARIANTS[name] for name in names) and not (STATIC / "config.json").exists():
        generator = random.Random(0)
        tokens = [[generator.randrange(512) for _ in range(128)] for _ in range(4)]
        quantize(str(MODEL), STATIC, "fp8_static", calibration=tokens)
    rows = []
    for name in names:
        keywords = dict(VARIANTS[name])
        kv_bytes, model = kv_bytes_under(args.cap, keywords), keywords.pop("model", MODEL)
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in keywords.items()]
        with served(model, f"--kv-cache-memory={kv_bytes}", f"--num-threads={args.threads}", *flags) as server:
            for rate in map(float, args.rates.split(",")):
                rows.append({"variant": name, "rate": rate, "kv_bytes": kv_bytes} | load(server.port, rate, args))
                figures = " ".join(f"{key} {rows[-1][key]:.4g}" for key in METRICS)
                print(f"{name:30} {rate:5.1f}/s {kv_bytes / 1e6:.0f} MB KV  {figures}", flush=True)
    about = {"machine": machine(), "command": " ".join(["python", *sys.argv]), "cap": args.cap, "input_len": args.input_len}
    results = about | {"output_len": args.output_len, "seconds": args.seconds, "rows": rows}
    print(table(results))
    if args.write:
        path = RESULTS / f"quantized_serving-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        write_part(ROOT / "docs" / "quantization.md", "serving", "benchmarks/quantized_serving.py", table(results))


if __name__ == "__main__":
    main()
