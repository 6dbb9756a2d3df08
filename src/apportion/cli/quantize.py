"""`apportion quantize`: a quantized checkpoint of a model."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub id of a model in floating point")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="new folder; an interrupted run goes on in it")
    parser.add_argument(
        "--scheme", help="fp8 (default), fp8_static, fp8_block, w8a8, w8a16, w4a16, w4a16_asym, w3a16, w2a16, or a scheme's own name"
    )
    parser.add_argument("--method", choices=("rtn", "gptq", "awq", "smoothquant"), help="default: rtn")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="YAML in llm-compressor's terms, in place of --scheme and --method")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text, or .jsonl with 'text', 'prompt' or 'messages'")
    parser.add_argument("--num-samples", type=int, default=128, metavar="N", help="calibration sequences")
    parser.add_argument("--max-seq-len", type=int, default=512, metavar="N", help="tokens of each")
    parser.add_argument("--ignore", action="append", metavar="NAME", help="stays as it is; 're:' starts an expression (default: lm_head)")
    parser.add_argument("--format", default="compressed-tensors", choices=("compressed-tensors", "fp8"), help="of the files")
    parser.add_argument("--kv-cache", action="store_true", help="calibrate scales for a float8 KV cache, too")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="text on which the loss against the original is measured")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    from apportion.quantization import quantize

    started, before = time.monotonic(), 0

    def show(done: int, total: int, what: str) -> None:
        nonlocal started, before
        passed, worked = time.monotonic() - started, done - before
        left = f", about {passed / worked * (total - done):.0f} s left" if worked > 0 and done < total else ""
        print(f"[{done}/{total}] {what}{left}", file=sys.stderr)
        if what.endswith("(kept)"):  # by the run that was interrupted: says nothing about the time of the others
            started, before = time.monotonic(), done + 1

    report = quantize(
        args.model, args.output, scheme=args.scheme, method=args.method, calibration=args.calibration, ignore=args.ignore,
        format=args.format, kv_cache=args.kv_cache, num_samples=args.num_samples, max_seq_len=args.max_seq_len,
        recipe=args.recipe, evaluate=args.evaluate, progress=None if args.quiet else show,
    )  # fmt: skip
    bits = 8 * report["quantized_bytes"] / max(report["num_quantized_weights"], 1)
    print(
        f"{args.output}: {len(report['projections'])} projections in {report['scheme']} ({bits:.2f} bits a weight), "
        f"{report['file_bytes'] / 1e6:.1f} MB of files, mean relative error {report['mean_relative_error']:.2e}"
    )
    if "evaluation" in report:
        lost = report["evaluation"]["metrics"]["nll_difference"]
        interval = "" if lost["low"] is None else f" ({lost['low']:.4g} .. {lost['high']:.4g})"
        print(f"loss against the original: {lost['value']:.4g} nat a token{interval}")
    return 0
