"""`apportion bench`: latency of a batch, throughput of a queue, load on a server, the machine's read bandwidth, models to measure with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.cli import bench_serve
from apportion.cli.flags import add_engine_flags
from apportion.cli.loading import load_llm
from apportion.core.errors import InvalidParameter

if TYPE_CHECKING:
    from apportion.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", metavar="WHAT", required=True)
    latency = commands.add_parser("latency", help="how long one batch takes, prefill and decode apart")
    latency.add_argument("--batch-size", type=int, default=8)
    latency.add_argument("--num-iters-warmup", type=int, default=1)
    latency.add_argument("--num-iters", type=int, default=5)
    latency.add_argument("--breakdown", action="store_true", help="also one decode step, operator by operator")
    latency.add_argument("--trace", type=Path, metavar="FILE", help="with --breakdown: that step for ui.perfetto.dev")
    throughput = commands.add_parser("throughput", help="how much a queue of requests gets through in all")
    throughput.add_argument("--num-prompts", type=int, default=64)
    throughput.add_argument("--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths are drawn from length * (1 +- R)")
    for command in (latency, throughput):
        command.add_argument("--input-len", type=int, default=128, help="prompt tokens, of random ids")
        command.add_argument("--output-len", type=int, default=128)
        command.add_argument("--data-seed", type=int, default=0, help="of token ids and lengths")
        command.add_argument("-q", "--quiet", action="store_true", help="nothing but the result")
        add_engine_flags(command)
    serve = commands.add_parser("serve", help="load on any OpenAI-compatible server: latency, throughput, goodput, reports")
    bench_serve.add_serve_arguments(serve)
    report = commands.add_parser("report", help="results of bench serve as one HTML page, side by side")
    bench_serve.add_report_arguments(report)
    bandwidth = commands.add_parser("bandwidth", help="how fast this machine reads memory: the floor under every decode step")
    bandwidth.add_argument("--num-threads", type=int, default=None)
    model = commands.add_parser("make-model", help="write a model of random weights")
    model.add_argument("--preset", required=True, help="bench-250m or bench-moe")
    model.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    model.add_argument("--data-seed", type=int, default=0, help="of the weights")
    for command in (latency, throughput, serve, bandwidth, model):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    if args.command in ("serve", "report"):
        return bench_serve.run_serve(args) if args.command == "serve" else bench_serve.run_report(args)
    result = {"latency": _latency, "throughput": _throughput, "bandwidth": _bandwidth, "make-model": _make_model}[args.command](args)
    if args.json:
        print(json.dumps(result))
        return 0
    for name, value in result.items():
        if not isinstance(value, list):
            print(f"{name:22} {value:.4g}" if isinstance(value, float) else f"{name:22} {value}")
    return 0


def _latency(args: argparse.Namespace) -> dict[str, Any]:
    from apportion.bench.latency import measure_latency

    if args.trace and not args.breakdown:
        raise InvalidParameter("--trace needs --breakdown")
    with load_llm(args, quiet=args.quiet) as llm:
        folder = Path(llm.config.models[0].model)
        result = measure_latency(
            llm,
            vocab=_vocab(llm),
            batch_size=args.batch_size,
            input_len=args.input_len,
            output_len=args.output_len,
            num_iters_warmup=args.num_iters_warmup,
            num_iters=args.num_iters,
            seed=args.data_seed,
        )
    return result | (_breakdown(args, folder) if args.breakdown else {})


def _breakdown(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The middle of the outputs is the step that is taken apart."""
    from apportion.bench.breakdown import measure_breakdown
    from apportion.bench.kernels import make_ops

    ops = make_ops(getattr(args, "num_threads", None))
    context_len = args.input_len + args.output_len // 2
    found = measure_breakdown(folder, ops, batch_size=args.batch_size, context_len=context_len, dtype=getattr(args, "dtype", "auto"))
    if args.trace:
        args.trace.write_text(json.dumps(found.trace))
    return {"breakdown_step_ms": found.step_ms} | {f"breakdown_{kind}_ms": ms for kind, ms in found.ms.items()}


def _throughput(args: argparse.Namespace) -> dict[str, Any]:
    from apportion.bench.throughput import measure_throughput

    with load_llm(args, quiet=args.quiet) as llm:
        return measure_throughput(
            llm,
            vocab=_vocab(llm),
            num_prompts=args.num_prompts,
            input_len=args.input_len,
            output_len=args.output_len,
            range_ratio=args.random_range_ratio,
            seed=args.data_seed,
        )


def _bandwidth(args: argparse.Namespace) -> dict[str, Any]:
    from apportion.bench.bandwidth import measure_bandwidth

    return measure_bandwidth(args.num_threads).as_dict()


def _make_model(args: argparse.Namespace) -> dict[str, Any]:
    from apportion.bench.make_model import make_model
    from apportion.bench.traffic import read_traffic

    make_model(args.preset, args.output, args.data_seed)
    traffic = read_traffic(args.output)
    return {
        "folder": str(args.output),
        "parameters": traffic.num_params,
        "bytes_per_token_batch_1": round(traffic.step_bytes(1, 0)),
    }


def _vocab(llm: LLM) -> int:
    return next(iter(llm.engine.models.values())).spec.vocab
