"""`apportion profile`: measures what the engine can choose by: where a model's attention scores lie, and how to multiply its linears."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--softmax", action="store_true", help="unified maxima of attention, on text: a file for --softmax-table")
    what.add_argument("--linear", action="store_true", help="every way through the model's linears: the dispatch table of this machine")
    what.add_argument(
        "--explain", type=int, nargs=3, metavar=("M", "N", "K"), help="what is chosen for M tokens of an N x K linear, and why"
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint folder or hub id (default: the bundled model)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="to calibrate on (default: a bundled passage)")
    parser.add_argument("--num-tokens", type=int, default=65536, metavar="N", help="of the text, at most (default: 65536)")
    parser.add_argument("--max-seq-len", type=int, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    parser.add_argument(
        "--scheme",
        nargs="+",
        default=[],
        metavar="S",
        help="of the linear to explain (default: bfloat16), or to measure the model's linears in (default: their own)",
    )
    parser.add_argument("--num-threads", type=int, metavar="N", help="compute threads (default: the cores at hand)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="interleaved, of which the median counts (default: 15)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: softmax.json; for --linear the table that dispatch reads"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    from apportion.core.errors import InvalidParameter

    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number < 1:
                raise InvalidParameter(f"--{name.replace('_', '-')} takes numbers from 1 on, got {number}")
    if args.explain:
        return _explain(args)
    return _softmax(args) if args.softmax else _linear(args)


def _softmax(args: argparse.Namespace) -> int:
    from apportion.assets import DEFAULT_MODEL, PASSAGE
    from apportion.evaluate.softmax_range import profile_softmax
    from apportion.models.checkpoint import resolve_folder
    from apportion.quantization import calibration_tokens

    folder = resolve_folder(args.model or str(DEFAULT_MODEL))
    tokens = calibration_tokens(str(folder), args.text or PASSAGE, max(1, args.num_tokens // args.max_seq_len), args.max_seq_len)
    table = profile_softmax(folder, tokens, _progress(args, "layer"))
    output = args.output or Path("softmax.json")
    table.write(output)
    worst = max(rate for heads in table.expected.values() for rate in heads)
    print(
        f"{output}: {table.num_enabled} of {table.num_heads} heads have a unified maximum, from {table.num_tokens} tokens; "
        f"expected recomputation {worst:.2%} of rows at worst"
    )
    return 0


def _linear(args: argparse.Namespace) -> int:
    from apportion.assets import DEFAULT_MODEL
    from apportion.bench.kernels import make_ops
    from apportion.evaluate.linear_profile import linears_of, profile_linears, worst_pick
    from apportion.kernels.interval_table import shipped_path
    from apportion.models.checkpoint import resolve_folder

    ops = make_ops(args.num_threads)
    specs = linears_of(resolve_folder(args.model or str(DEFAULT_MODEL)), ops, args.scheme)
    table = profile_linears(ops, specs, args.rounds, _progress(args, "linear"))
    output = args.output or shipped_path(table.device)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_file():
        table = table.merged_over(json.loads(output.read_text()))
    output.write_text(table.to_json())
    worst = max(map(worst_pick, table.rows.values()))
    print(f"{output}: {len(table.rows)} linears on {table.device}; a choice costs at most {worst - 1:.1%} over the best measured")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from apportion.bench.kernels import make_ops
    from apportion.core.number_format import Scheme

    m, n, k = args.explain
    ops = make_ops(args.num_threads)
    for scheme in args.scheme or ["bfloat16"]:
        print(ops.explain(Scheme.parse(scheme).name, n, k, m))
    return 0


def _progress(args: argparse.Namespace, what: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        print(f"[{done}/{total}] {what}", file=sys.stderr)

    return (lambda done, total: None) if args.quiet else show
