"""`apportion VERB ...`: finds the verb, imports its file alone, and turns errors into one sentence and an exit code.

Exit codes: 0 done, 2 an error of the caller or the checkpoint (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from apportion import __version__
from apportion.core.errors import ApportionError

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130

# verb -> what it does. Each is a module here (with _ for -) with add_arguments(parser) and run(args) -> exit code.
VERBS = {
    "generate": "complete prompts",
    "chat": "talk to a model in the terminal",
    "serve": "answer OpenAI's API over HTTP",
    "run-batch": "answer the requests of an OpenAI batch file",
    "eval": "measure quality: perplexity, distance to a reference, retrieval, free text, questions",
    "quantize": "write a quantized checkpoint of a model",
    "inspect": "say what is stored in a checkpoint, tensor by tensor, and what each projection is computed in",
    "profile": "measure what the engine can choose by: unified maxima of attention, the fastest way through each linear",
    "bench": "measure throughput or latency, or write a model of random weights to measure with",
    "simulate": "say how fast a parallel strategy would be on a cluster, and whether it would fit",
    "doctor": "say what this machine offers, which kernels are chosen and why, and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments and arguments[0] in VERBS else None
    parser = argparse.ArgumentParser(prog="apportion", description="Runs large language models fast on the hardware at hand.")
    parser.add_argument("--version", action="version", version=f"apportion {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, does in VERBS.items():
        verb_parser = verbs.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        if name == verb:  # only the verb that is called pays for its imports
            module = importlib.import_module(f"apportion.cli.{name.replace('-', '_')}")
            module.add_arguments(verb_parser)
            verb_parser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    args.arguments = arguments
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except ApportionError as error:
        print(f"apportion: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; keep the exit quiet
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
