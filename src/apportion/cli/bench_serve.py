"""`apportion bench serve` and `bench report`: load for any OpenAI-compatible server, and results side by side.

Flags are those of `vllm bench serve` where they mean the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apportion import __version__
from apportion.core.errors import BenchmarkFailed, InvalidParameter, Unsupported


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", help="of the server (default: from --host and --port)")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--backend", choices=["openai", "openai-chat"], default="openai", help="completions or chat completions")
    server.add_argument("--endpoint", metavar="PATH", help="another path than the backend's")
    server.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first it lists)")
    server.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="of every request; may be repeated")
    server.add_argument("--ready-check-timeout-sec", type=float, default=60, metavar="S", help="how long to wait for the server")
    server.add_argument("--request-timeout", type=float, default=600, metavar="S", help="an answer that takes longer has failed")
    server.add_argument("--server-pid", type=int, metavar="PID", help="report the CPU time of this process and its children")

    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=int, default=100)
    load.add_argument("--request-rate", type=float, default=math.inf, metavar="R", help="requests a second (default: all at once)")
    load.add_argument("--burstiness", type=float, default=1.0, metavar="SHAPE", help="of the gaps: 1 Poisson, less in bursts, inf even")
    load.add_argument("--max-concurrency", type=int, metavar="N", help="requests in flight; without a rate, a closed loop of N users")
    load.add_argument("--num-warmups", type=int, default=3, metavar="N", help="requests sent before, and not counted")
    load.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals")
    load.add_argument("--temperature", type=float, default=0.0)
    load.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, help="go on to the length asked for (default: unless custom)")
    load.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="further fields of every request")

    data = parser.add_argument_group("prompts")
    data.add_argument("--dataset-name", choices=["random", "trace", "custom"], default="random")
    data.add_argument("--dataset-path", type=Path, metavar="FILE", help="trace: Azure's .csv or Mooncake's .jsonl; custom: .jsonl")
    data.add_argument("--input-len", "--random-input-len", type=int, default=256, help="random: tokens of a prompt")
    data.add_argument("--output-len", "--random-output-len", type=int, help="tokens of an answer (default: 128; custom: the model's end)")
    data.add_argument("--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths are drawn from length * (1 +- R)")
    data.add_argument("--random-prefix-len", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    data.add_argument("--prompt-field", default="prompt", metavar="NAME", help="custom: where a line holds its prompt")
    data.add_argument("--vocab-size", type=int, default=512, metavar="N", help="prompts are token ids below N; with chat, words")
    data.add_argument("--text", action="store_true", help="words for the completions endpoint too")
    data.add_argument("--speedup", type=float, default=1.0, metavar="X", help="trace: X times as fast")
    data.add_argument("--length-scale", type=float, default=1.0, metavar="X", help="trace: lengths and blocks times X")
    data.add_argument("--max-model-len", type=int, metavar="N", help="trace: leave out what is longer, prompt and output together")

    result = parser.add_argument_group("results")
    result.add_argument("--slo", "--goodput", nargs="+", metavar="NAME=MS", help="ttft=200,tpot=50: what makes an answer good")
    result.add_argument("--metric-percentiles", default="50,90,99", metavar="P,P,...")
    result.add_argument("--label", help="of the run, in reports (default: the model)")
    result.add_argument("-o", "--result-dir", type=Path, metavar="FOLDER", help="write result.json, PNG plots and report.html")
    result.add_argument("--save-detailed", action="store_true", help="every request's own values into result.json")
    result.add_argument("-q", "--quiet", action="store_true", help="no progress")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE.html")


def run_report(args: argparse.Namespace) -> int:
    _need("matplotlib")
    from apportion.bench.report import draw_plots, read_result, write_report

    results = [read_result(path) for path in args.results]
    write_report(results, draw_plots(results), args.output)
    print(f"wrote {args.output}")
    return 0


def run_serve(args: argparse.Namespace) -> int:
    _need("httptools", "uvloop", *(["matplotlib"] if args.result_dir is not None else []))
    import uvloop
    from rich.console import Console

    from apportion.bench.report import draw_plots, print_result, write_plots, write_report

    result = uvloop.run(_measure(args))
    if args.result_dir is not None:
        args.result_dir.mkdir(parents=True, exist_ok=True)
        (args.result_dir / "result.json").write_text(json.dumps(result))
        plots = draw_plots([result])
        write_plots(plots, args.result_dir)
        write_report([result], plots, args.result_dir / "report.html")
    if args.json:
        print(json.dumps(result))
    else:
        print_result(result, Console())
        if args.result_dir is not None:
            print(f"\nwrote {args.result_dir}/result.json, report.html and plots")
    if not result["completed"]:
        raise BenchmarkFailed(f"no request succeeded: {next(iter(result['errors_by_kind']), 'none was sent')}")
    return 0


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from apportion.bench.http_stream import HttpClient
    from apportion.bench.serve import Target, offer_load, wait_ready
    from apportion.bench.server_cpu import ServerCpu
    from apportion.bench.serving_metrics import Slo, details, summarise

    slo = Slo.parse(",".join(args.slo)) if args.slo else None
    percentiles = _percentiles(args.metric_percentiles)
    samples, arrivals, num_too_long = _load(args, args.num_prompts, args.seed)
    ignore_eos = args.dataset_name != "custom" if args.ignore_eos is None else args.ignore_eos
    base_url = args.base_url or f"http://{args.host}:{args.port}"
    target = Target(args.backend, args.endpoint, args.temperature, ignore_eos, args.extra_body)
    client = HttpClient(base_url, _headers(args.header))
    model = args.model or await wait_ready(client, args.ready_check_timeout_sec)
    options: dict[str, Any] = {"max_concurrency": args.max_concurrency, "request_timeout": args.request_timeout}
    if args.num_warmups:
        warm, _, _ = _load(args, args.num_warmups, args.seed + 1)
        run = await offer_load(client, target, model, warm, None, **options)
        if failed := [record.error for record in run.records if record.error]:
            raise BenchmarkFailed(f"{len(failed)} of {len(warm)} warm-up requests failed: {failed[0]}")
    cpu = ServerCpu(args.server_pid) if args.server_pid else None
    with _Progress(len(samples), args.quiet) as progress:
        run = await offer_load(client, target, model, samples, arrivals, on_done=progress.advance, **options)
    client.close()
    result = {
        "label": args.label or model,
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "apportion_version": __version__,
        "command": shlex.join(["apportion", *sys.argv[1:]]) if not args.header else "apportion bench serve (headers withheld)",
        "backend": args.backend,
        "base_url": base_url,
        "model_id": model,
        "dataset_name": args.dataset_name if args.dataset_path is None else f"{args.dataset_name}: {args.dataset_path.name}",
        "num_prompts": len(samples),
        "num_warmups": args.num_warmups,
        "num_too_long": num_too_long,
        "request_rate": "trace" if args.dataset_name == "trace" else args.request_rate if math.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness if math.isfinite(args.burstiness) else "inf",
        "max_concurrency": args.max_concurrency,
        "seed": args.seed,
        **summarise(run, slo=slo, percentiles=percentiles),
    }
    if cpu is not None:
        result["server_cpu"] = cpu.since(result["total_output_tokens"])
    return result | (details(run) if args.save_detailed else {})


def _load(args: argparse.Namespace, num: int, seed: int) -> tuple[list[Any], list[float] | None, int]:
    """(samples, when to send them, how many were left out). No times: a closed loop."""
    from apportion.bench.arrivals import gamma_arrivals, trace_arrivals
    from apportion.bench.traces import read_trace
    from apportion.bench.workload import PromptMaker, file_samples, random_samples, trace_samples

    if num < 1:
        raise InvalidParameter(f"num_prompts must be at least 1, got {num}")
    if args.dataset_name != "random" and args.dataset_path is None:
        raise InvalidParameter(f"--dataset-name {args.dataset_name} needs --dataset-path")
    maker = PromptMaker(None if args.text or args.backend == "openai-chat" else args.vocab_size, seed)
    if args.dataset_name == "trace":
        entries = read_trace(args.dataset_path, num)
        found = trace_samples(maker, entries, length_scale=args.length_scale, max_len=args.max_model_len)
        return found.samples, trace_arrivals(found.times, speedup=args.speedup), found.num_too_long
    if args.dataset_name == "custom":
        samples = file_samples(args.dataset_path, num, prompt_field=args.prompt_field, output_len=args.output_len)
    else:
        lengths = {"input_len": args.input_len, "output_len": args.output_len or 128}
        samples = random_samples(maker, num, range_ratio=args.random_range_ratio, prefix_len=args.random_prefix_len, **lengths)
    if math.isinf(args.request_rate) and args.max_concurrency:
        return samples, None, 0
    return samples, gamma_arrivals(num, args.request_rate, args.burstiness, seed=seed), 0


def _need(*packages: str) -> None:
    """Errors: Unsupported that names what is not installed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise Unsupported(f"this needs {' and '.join(missing)}: pip install '.[bench]' in the checkout")


def _headers(pairs: list[str]) -> dict[str, str]:
    """OPENAI_API_KEY is the key, as for every client of such servers; --header goes before it."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or "\n" in pair:
            raise InvalidParameter(f"--header {name!r} is not NAME=VALUE")
        headers[name] = value
    return headers


def _percentiles(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidParameter(f"{text!r} is no list of percentiles such as 50,90,99") from None
    if not all(0 <= p <= 100 for p in found):
        raise InvalidParameter(f"percentiles lie between 0 and 100, got {text}")
    return found


class _Progress:
    """A bar on stderr while somebody watches."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.total, self.quiet, self.failed = total, quiet or not sys.stderr.isatty(), 0

    def __enter__(self) -> _Progress:
        if not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True)
            self.task = self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def advance(self, record: Any) -> None:
        self.failed += record.error is not None
        if not self.quiet:
            self.bar.update(self.task, advance=1, description=f"{self.failed} failed" if self.failed else "")

    def __exit__(self, *error: object) -> None:
        if not self.quiet:
            self.bar.stop()
