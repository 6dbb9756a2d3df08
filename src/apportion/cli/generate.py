"""`apportion generate`: complete prompts given as arguments, in a file or on stdin."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.cli.flags import add_engine_flags, add_sampling_flags, sampling_keywords
from apportion.cli.loading import load_llm
from apportion.core.errors import InvalidRequest
from apportion.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from apportion.core.outputs import RequestOutput
    from apportion.llm import LLM


MAX_TOKENS = 128  # of a completion, where the flags do not say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="prompts; none reads them from --input or stdin, one a line")
    parser.add_argument("--input", type=Path, metavar="FILE", help="a file of prompts, one a line (.jsonl: objects with 'prompt')")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing but the result")
    parser.add_argument("-n", type=int, default=argparse.SUPPRESS, help="completions of each prompt")
    parser.add_argument(
        "--logprobs", type=int, default=argparse.SUPPRESS, metavar="N", help="with --json: the N most likely tokens at each position"
    )
    parser.add_argument("--prompt-logprobs", type=int, default=argparse.SUPPRESS, metavar="N")
    add_engine_flags(parser)
    add_sampling_flags(parser)


def run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    given = sampling_keywords(args)
    SamplingParams(**given)  # refuse before anything is loaded
    with load_llm(args, quiet=args.quiet) as llm:
        params = dataclasses.replace(llm.get_default_sampling_params(), **{"max_tokens": MAX_TOKENS, **given})
        if len(prompts) == 1 and params.n == 1 and not args.json:
            return _stream(llm, prompts[0], params)
        outputs = llm.generate(prompts, params, use_tqdm=not args.quiet and sys.stderr.isatty())
    for output in outputs:
        if args.json:
            print(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
        else:
            print("\n".join(f"{output.prompt}{completion.text}" for completion in output.outputs), end="\n\n")
    return _report_errors(outputs)


def _stream(llm: LLM, prompt: str, params: SamplingParams) -> int:
    print(prompt, end="", flush=True)
    shown, last = 0, None
    for last in llm.stream(prompt, params):
        text = last.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()
    return _report_errors([last] if last else [])


def _report_errors(outputs: list[RequestOutput]) -> int:
    """Failed completions on stderr; the others have been printed."""
    failed = [(output, c) for output in outputs for c in output.outputs if c.error]
    for output, completion in failed:
        print(f"apportion: prompt {output.request_id}: {completion.error}", file=sys.stderr)
    return 2 if failed else 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt and args.input:
        raise InvalidRequest("give prompts as arguments or --input, not both")
    if args.prompt:
        prompts: list[str] = args.prompt
        return prompts
    if args.input is None and sys.stdin.isatty():
        raise InvalidRequest("no prompt: give one as an argument, with --input FILE, or on stdin")
    try:
        text = args.input.read_text("utf-8") if args.input else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the prompts cannot be read: {error}") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if args.input and args.input.suffix == ".jsonl":
        return [_prompt_of(line, number) for number, line in enumerate(lines, 1)]
    if not lines:
        raise InvalidRequest("no prompt: the input is empty")
    return lines


def _prompt_of(line: str, number: int) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"line {number} of the input is no JSON object with 'prompt'") from error
    if not isinstance(prompt, str):
        raise InvalidRequest(f"line {number} of the input: 'prompt' must be text")
    return prompt
