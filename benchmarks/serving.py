"""The server under load, held to the issue's bars: python benchmarks/serving.py [--model FOLDER] [--only NAME ...].

throughput   64 streaming clients through HTTP against `apportion bench throughput` on the same requests; CPU of each process
ttft         time to first token at batch 1 through HTTP against `LLM.stream` in one process
streams      200 streams at once on the bundled model: none lost, none silent for 10 s
start        `apportion serve` to the first answered request
soak         resident memory over 20,000 short requests, some of them aborted

The client speaks HTTP over plain sockets in a process of its own, which is niced where the server is not, so that it takes as little as
a client can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from run_all import machine

from apportion.bench.throughput import draw_requests

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "src" / "apportion" / "assets" / "dense"
DOCS = ROOT / "docs" / "serving.md"
MARK, MARK_END = "<!-- measured: written by benchmarks/serving.py -->", "<!-- measured: end -->"
EVENT = b"data: {"


@dataclass(slots=True)
class Answer:
    """Of one streamed request; times in seconds since its start. gap_s: the longest silence."""

    status: int = 0
    num_events: int = 0
    num_tokens: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    gap_s: float = 0.0
    complete: bool = False


async def stream(port: int, body: dict[str, Any], leave_after: int | None = None) -> Answer:
    """One streamed request. leave_after: close the connection after so many events."""
    answer = Answer()
    start = last = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + payload)
    tail = b""
    try:
        while piece := await reader.read(65536):
            now = time.monotonic()
            answer.gap_s, last = max(answer.gap_s, now - last), now
            data = tail + piece
            if not answer.status:
                answer.status = int(data[9:12])
            events = data.count(EVENT) - tail.count(EVENT)
            if events and not answer.num_events:
                answer.ttft_s = now - start
            answer.num_events += events
            answer.complete |= b"data: [DONE]" in data
            found = re.search(rb'"completion_tokens":(\d+)', data)
            answer.num_tokens = int(found[1]) if found else answer.num_tokens
            if leave_after is not None and answer.num_events >= leave_after:
                break
            tail = data[-400:]
    except OSError:
        pass
    writer.close()
    answer.e2e_s = time.monotonic() - start
    return answer


@dataclass(slots=True)
class Served:
    port: int
    api: psutil.Process
    engine: psutil.Process
    start_s: float = field(default_factory=time.monotonic)

    def cpu_s(self) -> tuple[float, float]:
        """CPU time so far of the API process and of the engine process."""
        return tuple(sum(p.cpu_times()[:2]) for p in (self.api, self.engine))  # type: ignore[return-value]


@contextmanager
def served(model: Path, *flags: str) -> Iterator[Served]:
    """`apportion serve`, ready."""
    command = [sys.executable, "-m", "apportion.cli.main", "serve", f"bench={model}", "--port", "0", "--disable-uvicorn-access-log", *flags]
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    port = listening(process)
    try:
        while not ready(port):
            time.sleep(0.01)
        api = psutil.Process(process.pid)
        yield Served(port, api, api.children()[0], start)
    finally:
        process.terminate()
        process.wait(60)


def listening(process: subprocess.Popen[str]) -> int:
    """The port that the server says it listens on."""
    assert process.stderr is not None
    return next(int(found[1]) for line in process.stderr if (found := re.search(r"serving http://[\d.]+:(\d+)", line)))


def ready(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def random_prompt(length: int, seed: int, vocab: int = 4000) -> list[int]:
    return random.Random(seed).choices(range(10, vocab), k=length)


@contextmanager
def client() -> Iterator[Callable[..., Any]]:
    """A function that runs another, with its arguments, in the client's process, and returns what that returns."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=os.nice, initargs=(10,)) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def at_once(port: int, bodies: list[dict[str, Any]]) -> tuple[list[Answer], float, float]:
    """The answers, how long they took together, and the CPU time of this process."""

    async def ask() -> list[Answer]:
        return await asyncio.gather(*(stream(port, body) for body in bodies))

    start, cpu = time.monotonic(), time.process_time()
    answers = asyncio.run(ask())
    return answers, time.monotonic() - start, time.process_time() - cpu


def direct_throughput(model: Path, clients: int, input_len: int, output_len: int) -> float:
    """Output tokens a second of the same requests, without a server."""
    command = [sys.executable, "-m", "apportion.cli.main", "bench", "throughput", "--model", str(model), "--num-prompts", str(clients)]
    command += ["--input-len", str(input_len), "--output-len", str(output_len), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    return float(json.loads(done.stdout)["output_tokens_per_s"])


def measure_throughput(model: Path, clients: int = 64, input_len: int = 128, output_len: int = 128) -> dict[str, Any]:
    """Through HTTP between two runs without, whose mean it is compared with."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    requests = draw_requests(vocab=vocab, num_prompts=clients, input_len=input_len, output_len=output_len)
    bodies = [{"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True} for prompt, length in requests]
    direct = [direct_throughput(model, clients, input_len, output_len)]
    with served(model) as server, client() as run:
        run(at_once, server.port, [{**body, "max_tokens": 4, "prompt": body["prompt"][::-1]} for body in bodies[:8]])
        before = server.cpu_s()
        answers, elapsed, client_cpu = run(at_once, server.port, bodies)
        api, engine = (after - b for after, b in zip(server.cpu_s(), before, strict=True))
    tokens = sum(answer.num_tokens for answer in answers)
    direct.append(direct_throughput(model, clients, input_len, output_len))
    return {
        "clients": clients,
        "lost": sum(not answer.complete for answer in answers),
        "tokens_per_s": tokens / elapsed,
        "direct_tokens_per_s": direct,
        "ratio": tokens / elapsed / statistics.mean(direct),
        "api_cpu_ms_per_token": api / tokens * 1e3,
        "engine_cpu_ms_per_token": engine / tokens * 1e3,
        "client_cpu_s": client_cpu,
        "events_per_token": sum(answer.num_events for answer in answers) / tokens,
    }


def measure_ttft(model: Path, repeats: int = 30, input_len: int = 128) -> dict[str, Any]:
    """Each prompt through the server and without one, in turn. This client is not niced: it would have to wait until the step after the
    first token leaves it a core."""
    from apportion.core.sampling_params import SamplingParams
    from apportion.llm import LLM

    through, direct = [], []
    params = SamplingParams(temperature=0, max_tokens=2)
    with served(model, "--kv-cache-memory", "256MiB") as server, LLM(model, kv_cache_memory=256 << 20) as llm:
        for seed in range(repeats + 1):
            prompt = random_prompt(input_len, 1000 + seed)
            through.append(asyncio.run(stream(server.port, {"prompt": prompt, "max_tokens": 2, "temperature": 0})).ttft_s)
            start, tokens = time.monotonic(), llm.stream({"prompt_token_ids": prompt}, params)
            next(iter(tokens))
            direct.append(time.monotonic() - start)
            for _ in tokens:
                pass  # to its end, before the next one begins
    p50, p50_direct = (statistics.median(times[1:]) * 1e3 for times in (through, direct))  # the first one warms up
    return {"p50_ms": p50, "direct_p50_ms": p50_direct, "added_ms": p50 - p50_direct}


def measure_streams(model: Path, count: int = 200) -> dict[str, Any]:
    bodies = [{"prompt": random_prompt(32, i), "max_tokens": 200, "temperature": 0.8, "ignore_eos": True} for i in range(count)]
    with served(model) as server, client() as run:
        before = server.cpu_s()
        answers, elapsed, _ = run(at_once, server.port, bodies)
        api = server.cpu_s()[0] - before[0]
    tokens = sum(answer.num_tokens for answer in answers)
    return {
        "streams": count,
        "lost": sum(not answer.complete for answer in answers),
        "stalled_over_10_s": sum(answer.gap_s > 10 for answer in answers),
        "longest_gap_s": max(answer.gap_s for answer in answers),
        "tokens_per_s": tokens / elapsed,
        "api_cpu_ms_per_token": api / tokens * 1e3,
        "events_per_token": sum(answer.num_events for answer in answers) / tokens,
    }


def measure_start(model: Path) -> dict[str, Any]:
    """By `make serve` where its environment exists; without one by the command that it runs."""
    by_make = (ROOT / ".venv" / ".installed").exists()
    command = [sys.executable, "-m", "apportion.cli.main", "serve", "--port", "0"]
    start = time.monotonic()
    process = subprocess.Popen(
        ["make", "-s", "serve", "SERVE_ARGS=--port 0"] if by_make else command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    try:
        port = listening(process)
        url_s = time.monotonic() - start
        while not ready(port):
            time.sleep(0.01)
        ready_s = time.monotonic() - start
        answer = asyncio.run(stream(port, {"prompt": "Once", "max_tokens": 4}))
        assert answer.complete
        return {"by_make": by_make, "url_s": url_s, "ready_s": ready_s, "first_answer_s": time.monotonic() - start}
    finally:
        process.terminate()
        process.wait(60)


def short_requests(port: int, seeds: range, concurrency: int) -> None:
    """One for each seed, a quarter of them given up after their first token."""

    async def ask(left: Iterator[int]) -> None:
        for seed in left:
            draw = random.Random(seed)
            body = {"prompt": random_prompt(draw.randint(1, 24), seed), "max_tokens": draw.randint(1, 8), "ignore_eos": True}
            await stream(port, body, leave_after=draw.choice([None, None, None, 1]))

    async def ask_all() -> None:
        left = iter(seeds)
        await asyncio.gather(*(ask(left) for _ in range(concurrency)))

    asyncio.run(ask_all())


def measure_soak(model: Path, requests: int = 20_000, warmup: int = 2_000, concurrency: int = 32) -> dict[str, Any]:
    """Resident memory after the warm-up, and after `requests` more."""
    with served(model) as server, client() as run:
        run(short_requests, server.port, range(warmup), concurrency)
        first = [p.memory_info().rss for p in (server.api, server.engine)]
        run(short_requests, server.port, range(warmup, warmup + requests), concurrency)
        last = [p.memory_info().rss for p in (server.api, server.engine)]
    mib = dict(zip(("api_rss_mib", "engine_rss_mib"), (rss / 2**20 for rss in last), strict=True))
    return {"requests": requests, "warmup": warmup, **mib, "growth_in_all": sum(last) / sum(first) - 1}


def rows(measured: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, bool]]:
    """What was promised: the words, what was measured, the bar, whether it is met."""
    if found := measured.get("throughput"):
        ratio, cpu = found["ratio"], found["api_cpu_ms_per_token"]
        direct = " and ".join(f"{value:.0f}" for value in found["direct_tokens_per_s"])
        note = f"{found['tokens_per_s']:.0f} of {direct} tokens/s, client {found['client_cpu_s']:.2f} s of CPU"
        yield f"{found['clients']} streaming clients, of `bench throughput`", f"{ratio:.1%} ({note})", "90 %", ratio >= 0.9
        yield "CPU of the API process, a streamed token", f"{cpu:.3f} ms", "0.15 ms", cpu <= 0.15
    if found := measured.get("streams"):
        met = not found["lost"] and not found["stalled_over_10_s"]
        told = f"{found['lost']} lost, longest silence {found['longest_gap_s']:.2f} s, {found['tokens_per_s']:.0f} tokens/s"
        told += f", {found['api_cpu_ms_per_token']:.3f} ms of the API process's CPU a token"
        yield f"{found['streams']} streams at once, bundled model", told, "0 lost, 10 s", met
    if found := measured.get("ttft"):
        told = f"{found['added_ms']:.1f} ms ({found['p50_ms']:.1f} against {found['direct_p50_ms']:.1f})"
        yield "added to the median TTFT at batch 1", told, "10 ms", found["added_ms"] <= 10
    if found := measured.get("start"):
        told = f"{found['first_answer_s']:.2f} s (ready after {found['ready_s']:.2f} s)"
        yield f"{'`make serve`' if found['by_make'] else 'start'} to the first answered request", told, "5 s", found["first_answer_s"] <= 5
    if found := measured.get("soak"):
        told = f"{found['growth_in_all']:+.2%} (API {found['api_rss_mib']:.0f} MiB, engine {found['engine_rss_mib']:.0f} MiB)"
        yield f"resident memory over {found['requests']:,} short requests, a quarter aborted", told, "+2 %", found["growth_in_all"] <= 0.02


def write_docs(results: dict[str, Any]) -> None:
    about = results["machine"]
    commits = " and ".join(sorted({found["commit"] for found in results["measured"].values()}))
    lines = [
        f"{about['cores']} cores of {about['processor']} ({', '.join(about['sets'])}), measured at {commits}, {results['date']}:",
        "",
    ]
    lines += ["| promise | measured | bar | |", "|---|---|---|---|"]
    lines += [f"| {what} | {told} | {bar} | {'met' if met else 'missed'} |" for what, told, bar, met in rows(results["measured"])]
    page = DOCS.read_text()
    head, _, rest = page.partition(MARK)
    DOCS.write_text(f"{head}{MARK}\n" + "\n".join(lines) + f"\n{MARK_END}" + rest.partition(MARK_END)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="for throughput and ttft (default: the bundled model)")
    measures = {
        "throughput": measure_throughput,
        "ttft": measure_ttft,
        "streams": measure_streams,
        "start": measure_start,
        "soak": measure_soak,
    }
    parser.add_argument("--only", nargs="+", choices=list(measures), default=list(measures))
    parser.add_argument("--save", action="store_true", help="into benchmarks/results/serving-DATE.json and docs/serving.md")
    args = parser.parse_args()
    about, today = machine(), date.today().isoformat()
    path = ROOT / "benchmarks" / "results" / f"serving-{today}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"measured": {}}
    results |= {"machine": about, "date": today}
    for name in args.only:
        model = args.model if name in ("throughput", "ttft") else BUNDLED
        command = f"python benchmarks/serving.py --model {model.name} --only {name}"
        found = {"command": command, "commit": about["commit"], **measures[name](model)}
        results["measured"][name] = found
        print(name, json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}), flush=True)
        if args.save:
            path.write_text(json.dumps(results, indent=1) + "\n")
            write_docs(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
