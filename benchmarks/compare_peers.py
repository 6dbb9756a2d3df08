"""Ours against the peers, interleaved: in every round each engine runs the same case once, all others stopped.

    python benchmarks/compare_peers.py [--cases decode-1,prefill-512] [--engines apportion,vllm] [--rounds 5]

A short run of every engine in every dtype comes first: an engine enters the rounds with its faster dtype, case by case, and not at
all where it has less than a quarter of the best rate (its figure is then the short run's). The figure of a case is the median over
the rounds, the ratio the median of the rounds' ratios to the best peer. Every engine is a process of its own (peers/*_peer.py) with
--threads threads; processes that are not being measured are stopped (SIGSTOP).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apportion.bench.bandwidth import measure_bandwidth
from apportion.bench.make_model import make_model
from apportion.bench.traffic import read_traffic

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / ".cache" / "bench"
SCREEN_OUTPUT_LEN = 17  # of the short runs that choose a dtype
HOPELESS = 0.25  # of the best rate in the short runs: such an engine is left out of the rounds
SETTLE_S = 0.3  # for spinning threads of the process that ran last to go to sleep


@dataclass(frozen=True)
class Case:
    """to_reach: least ratio to the best peer, or to the named engine."""

    model: str
    batch: int
    prompt_len: int
    output_len: int
    to_reach: dict[str, float]

    @property
    def is_prefill(self) -> bool:
        return self.output_len == 1

    def tokens_per_s(self, answer: dict[str, Any]) -> float:
        if self.is_prefill:
            return self.batch * self.prompt_len / answer["prefill_s"]
        return self.batch * (len(answer["token_ids"][0]) - 1) / answer["decode_s"]


CASES = {
    "decode-1": Case("bench-250m", 1, 128, 128, {"best": 1.4}),
    "decode-8": Case("bench-250m", 8, 128, 128, {"best": 2.1}),
    "decode-16": Case("bench-250m", 16, 128, 128, {"best": 1.75}),
    "prefill-512": Case("bench-250m", 1, 512, 1, {"best": 1.5}),
    "moe-decode-1": Case("bench-moe", 1, 128, 128, {"transformers": 2.0, "llama_cpp": 1.3}),
    "moe-decode-8": Case("bench-moe", 8, 128, 128, {"transformers": 2.0, "llama_cpp": 1.3}),
}


@dataclass(frozen=True)
class Variant:
    """One engine in one dtype. weight_bytes, kv_bytes: of a stored number, for the bytes a token reads.

    unless: a processor feature that makes this dtype pointless, as matrix tiles for bf16 do.
    """

    engine: str
    dtype: str
    weight_bytes: float
    kv_bytes: float
    mandatory: bool = False
    unless: str = ""

    @property
    def python(self) -> str:
        return sys.executable if self.engine == "apportion" else str(ROOT / ".venv-peers" / self.engine / "bin" / "python")

    def command(self, model: str, threads: int) -> list[str]:
        script = ROOT / "benchmarks" / "peers" / f"{self.engine}_peer.py"
        return [self.python, str(script), str(MODELS / model), "--threads", str(threads), "--dtype", self.dtype]


VARIANTS = (
    Variant("apportion", "bfloat16", 2, 2, mandatory=True),
    Variant("llama_cpp", "bf16", 2, 2, mandatory=True),  # its KV cache is f16
    Variant("transformers", "float32", 4, 4, mandatory=True),
    Variant("transformers", "bfloat16", 2, 2, mandatory=True),
    Variant("openvino", "auto", 2, 1),  # its KV cache is u8 unless told otherwise
    Variant("vllm", "bfloat16", 2, 2),
    Variant("vllm", "float32", 4, 4, unless="amx_bf16"),
)


@dataclass(eq=False)
class Process:
    """A running engine, stopped unless `run` is under way."""

    variant: Variant
    child: subprocess.Popen[str]
    about: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(cls, variant: Variant, model: str, threads: int, log: Path) -> Process:
        child = subprocess.Popen(
            variant.command(model, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            start_new_session=True,
        )
        process = cls(variant, child)
        process.about = process._answer()
        process._signal(signal.SIGSTOP)
        return process

    def run(self, case: Case, output_len: int, seed: int) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        try:
            self._ask(case.batch, 32, 4, seed=0)  # awake and its weights in reach again
            return self._ask(case.batch, case.prompt_len, output_len, seed)
        finally:
            time.sleep(SETTLE_S)
            self._signal(signal.SIGSTOP)

    def end(self) -> None:
        self._signal(signal.SIGCONT)
        self.child.stdin.close()
        try:
            self.child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.child.wait()

    def _ask(self, batch: int, prompt_len: int, output_len: int, seed: int) -> dict[str, Any]:
        request = {"batch": batch, "prompt_len": prompt_len, "output_len": output_len, "seed": seed}
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.child.stdout.readline()
        if not line:
            raise ChildProcessError(f"{self.variant.engine} ({self.variant.dtype}) ended with status {self.child.wait()}")
        return json.loads(line)

    def _signal(self, number: int) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, number)


def start_all(model: str, engines: list[str], threads: int) -> tuple[list[Process], dict[str, str]]:
    """The processes, and why others are missing. Errors: ChildProcessError when a mandatory one does not start."""
    if not (MODELS / model / "model.safetensors").exists():
        make_model(model, MODELS / model)
    processes: list[Process] = []
    missing: dict[str, str] = {}
    features = Path("/proc/cpuinfo").read_text().split()
    for variant in VARIANTS:
        if variant.engine not in engines or variant.unless in features:
            continue
        log = MODELS / f"{model}-{variant.engine}-{variant.dtype}.log"
        try:
            if not Path(variant.python).exists():
                raise ChildProcessError(f"{variant.engine} is not installed: run benchmarks/peers/install.py")
            processes.append(Process.start(variant, model, threads, log))
            print(f"  {variant.engine} {variant.dtype}: ready", file=sys.stderr)
        except ChildProcessError as error:
            if variant.mandatory:
                for process in processes:
                    process.end()
                raise ChildProcessError(f"{error}; its log is {log}") from None
            missing[f"{variant.engine} {variant.dtype}"] = str(error)
            print(f"  {variant.engine} {variant.dtype}: missing: {error}", file=sys.stderr)
    return processes, missing


def choose_variants(processes: list[Process], case: Case) -> dict[Process, float]:
    """The faster process of every engine, with its rate in a short run of this very case."""
    chosen: dict[str, tuple[float, Process]] = {}
    for process in processes:
        rate = case.tokens_per_s(process.run(case, min(case.output_len, SCREEN_OUTPUT_LEN), seed=1))
        if rate > chosen.get(process.variant.engine, (0.0, process))[0]:
            chosen[process.variant.engine] = (rate, process)
    return {process: rate for rate, process in chosen.values()}


def measure_case(processes: list[Process], case: Case, rounds: int) -> dict[str, Any]:
    """Rates per engine and round, then what they amount to."""
    short = choose_variants(processes, case)
    running = [p for p, rate in short.items() if rate >= HOPELESS * max(short.values()) or p.variant.mandatory]
    rates = {p.variant.engine: [] if p in running else [rate] for p, rate in short.items()}
    first_tokens: dict[str, list[int]] = {}
    for number in range(rounds):
        turn = number % len(running)
        for process in running[turn:] + running[:turn]:  # nobody always runs after the same one
            answer = process.run(case, case.output_len, seed=100 + number)
            rates[process.variant.engine].append(case.tokens_per_s(answer))
            if number == 0:
                first_tokens[process.variant.engine] = [row[0] for row in answer["token_ids"]]
    return summarize(case, list(short), rates, first_tokens)


def summarize(case: Case, chosen: list[Process], rates: dict[str, list[float]], first_tokens: dict[str, list[int]]) -> dict[str, Any]:
    traffic = read_traffic(MODELS / case.model)
    context_len = case.prompt_len + case.output_len / 2
    medians = {engine: statistics.median(values) for engine, values in rates.items()}
    engines = {
        p.variant.engine: {
            "dtype": p.about["dtype"],
            "version": p.about["version"],
            "tokens_per_s": medians[p.variant.engine],
            "rounds": rates[p.variant.engine],
            "bytes_per_token": None
            if case.is_prefill
            else traffic.step_bytes(case.batch, context_len, p.variant.weight_bytes, p.variant.kv_bytes) / case.batch,
        }
        for p in chosen
    }
    result: dict[str, Any] = {"engines": engines, "batch": case.batch, "prompt_len": case.prompt_len, "output_len": case.output_len}
    ours = first_tokens.get("apportion")
    if ours is not None:
        result["first_tokens_equal"] = {engine: tokens == ours for engine, tokens in first_tokens.items()}
        result["bars"] = [bar(case, name, least, rates, medians) for name, least in case.to_reach.items()]
    return result


def bar(case: Case, name: str, least: float, rates: dict[str, list[float]], medians: dict[str, float]) -> dict[str, Any]:
    peers = {engine: value for engine, value in medians.items() if engine != "apportion"}
    against = max(peers, key=peers.__getitem__) if name == "best" else name
    if against not in rates:
        return {"against": against, "to_reach": least, "ratio": None, "met": None}
    ratios = [ours / theirs for ours, theirs in zip(rates["apportion"], rates[against], strict=False)]  # a short run has one
    ratio = statistics.median(ratios)
    return {"against": against, "to_reach": least, "ratio": ratio, "rounds": ratios, "met": ratio >= least}


def compare(cases: list[str], engines: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """All cases, model by model. The floor: what reading a step's bytes takes at the bandwidth measured first and last."""
    results: dict[str, Any] = {"threads": threads, "rounds": rounds, "cases": {}, "missing": {}}
    bandwidth = measure_bandwidth(threads)
    for model in dict.fromkeys(CASES[name].model for name in cases):
        print(f"{model}: starting engines", file=sys.stderr)
        processes, results["missing"][model] = start_all(model, engines, threads)
        try:
            for name in (name for name in cases if CASES[name].model == model):
                results["cases"][name] = measure_case(processes, CASES[name], rounds)
                print_case(name, results["cases"][name])
        finally:
            for process in processes:
                process.end()
    bandwidth = max(bandwidth, measure_bandwidth(threads), key=lambda measured: measured.best)
    results["bandwidth"] = bandwidth.as_dict()
    for name in cases:
        case = CASES[name]
        if not case.is_prefill:
            step_bytes = read_traffic(MODELS / case.model).step_bytes(case.batch, case.prompt_len + case.output_len / 2)
            results["cases"][name]["floor_tokens_per_s"] = case.batch / bandwidth.floor_s(step_bytes)
    return results


def print_case(name: str, result: dict[str, Any]) -> None:
    for engine, figures in result["engines"].items():
        bytes_per_token = figures["bytes_per_token"]
        traffic = f"{bytes_per_token / 1e6:8.1f} MB/token" if bytes_per_token else ""
        print(f"{name:14} {engine:13} {figures['dtype']:9} {figures['tokens_per_s']:9.1f} tok/s {traffic}", flush=True)
    for b in result.get("bars", ()):
        if b["ratio"] is not None:
            print(
                f"{name:14} x{b['ratio']:.2f} of {b['against']}, to reach x{b['to_reach']}: {'met' if b['met'] else 'missed'}", flush=True
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines = list(dict.fromkeys(variant.engine for variant in VARIANTS))
    parser.add_argument("--cases", default=",".join(CASES), help=f"default: {','.join(CASES)}")
    parser.add_argument("--engines", default=",".join(engines), help=f"default: {','.join(engines)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    try:
        results = compare(args.cases.split(","), args.engines.split(","), args.rounds, args.threads)
    except ChildProcessError as error:
        print(f"compare_peers: {error}", file=sys.stderr)
        return 1
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
