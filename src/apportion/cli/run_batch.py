"""`apportion run-batch`: the requests of an OpenAI batch file, answered without a server. Flags are those of `vllm run-batch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from apportion.cli.flags import add_engine_flags
from apportion.cli.serve import add_model_flags, serve_config

EXIT_SOME_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input-file", type=Path, required=True, metavar="FILE", help="JSON lines: custom_id, method, url, body")
    parser.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help="answers, as they are finished; overwritten")
    parser.add_argument(
        "--model", dest="models", nargs="+", default=[], metavar="MODEL", help="folders or hub ids, or NAME=FOLDER_OR_ID (default: bundled)"
    )
    parser.add_argument("--max-concurrency", type=int, default=512, metavar="N", help="requests open at once (default: 512)")
    add_model_flags(parser)
    add_engine_flags(parser, model=False)


def run(args: argparse.Namespace) -> int:
    from apportion.serving.batch_file import run_batch

    answered, failed = run_batch(serve_config(args), args.input_file, args.output_file, args.max_concurrency)
    print(f"{answered} answered, {failed} failed: {args.output_file}", file=sys.stderr)
    return EXIT_SOME_FAILED if failed else 0
