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
        "--scheme", default="fp8", help="fp8, fp8_static, fp8_block, w8a8, w8a16, w4a16, w4a16_asym, w3a16, w2a16, or a scheme's own name"
    )
    parser.add_argument("--method", default="rtn", choices=("rtn", "gptq", "awq", "smoothquant"))
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text, or .jsonl with 'text', 'prompt' or 'messages'")
    parser.add_argument("--num-samples", type=int, default=128, metavar="N", help="calibration sequences")
    parser.add_argument("--max-seq-len", type=int, default=512, metavar="N", help="tokens of each")
    parser.add_argument("--ignore", action="append", metavar="NAME", help="stays as it is; 're:' starts an expression (default: lm_head)")
    parser.add_argument("--format", default="compressed-tensors", choices=("compressed-tensors", "fp8"), help="of the files")
    parser.add_argument("--kv-cache", action="store_true", help="calibrate scales for a float8 KV cache, too")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    from apportion.quantization import quantize

    started = time.monotonic()

    def show(done: int, total: int, what: str) -> None:
        passed = time.monotonic() - started
        left = f", about {passed / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"[{done}/{total}] {what}{left}", file=sys.stderr)

    report = quantize(
        args.model, args.output, scheme=args.scheme, method=args.method, calibration=args.calibration, ignore=args.ignore or ("lm_head",),
        format=args.format, kv_cache=args.kv_cache, num_samples=args.num_samples, max_seq_len=args.max_seq_len,
        progress=None if args.quiet else show,
    )  # fmt: skip
    bits = 8 * report["quantized_bytes"] / max(report["num_quantized_weights"], 1)
    print(
        f"{args.output}: {len(report['projections'])} projections in {report['scheme']} ({bits:.2f} bits a weight), "
        f"{report['file_bytes'] / 1e6:.1f} MB of files, mean relative error {report['mean_relative_error']:.2e}"
    )
    return 0
