"""`apportion chat`: a conversation in the terminal, or one question and its answer."""

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

MAX_TOKENS = 512  # of an answer, where the flags do not say
COMMANDS = "/reset forgets the conversation, /exit ends it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("message", nargs="?", help="one message to answer; none starts a conversation (stdin, one message a line)")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="jinja2 template instead of the model's own")
    parser.add_argument("--json", action="store_true", help="one JSON object an answer on stdout")
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing but the answers")
    add_engine_flags(parser)
    add_sampling_flags(parser)


def run(args: argparse.Namespace) -> int:
    try:
        template = args.chat_template.read_text("utf-8") if args.chat_template else None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the chat template cannot be read: {error}") from error
    given = sampling_keywords(args)
    SamplingParams(**given)  # refuse before anything is loaded
    with load_llm(args, quiet=args.quiet) as llm:
        params = dataclasses.replace(llm.get_default_sampling_params(), **{"max_tokens": MAX_TOKENS, **given})
        beginning = [{"role": "system", "content": args.system}] if args.system else []
        if args.message is not None:
            return 2 if _answer(llm, [*beginning, {"role": "user", "content": args.message}], params, template, args.json).error else 0
        return _converse(llm, beginning, params, template, args)


def _converse(llm: LLM, beginning: list[dict[str, str]], params: SamplingParams, template: str | None, args: argparse.Namespace) -> int:
    watched = sys.stdin.isatty() and not args.quiet
    if watched:
        print(COMMANDS, file=sys.stderr)
    messages = list(beginning)
    while True:
        if watched:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/exit":
            return 0
        if text == "/reset":
            messages = list(beginning)
        elif text:
            messages.append({"role": "user", "content": text})
            answer = _answer(llm, messages, params, template, args.json)
            if answer.error:
                return 2
            messages.append({"role": "assistant", "content": answer.text})


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    text: str
    error: str | None


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams, template: str | None, as_json: bool) -> Answer:
    """Print the answer as it comes."""
    prompt = llm.render_chat(messages, template)
    shown, last = 0, None
    for last in llm.stream(prompt, params, add_special_tokens=False):
        if not as_json:
            print(last.outputs[0].text[shown:], end="", flush=True)
            shown = len(last.outputs[0].text)
    return _end(last, as_json)


def _end(last: RequestOutput | None, as_json: bool) -> Answer:
    if last is None:
        raise InvalidRequest("the engine gave no answer")
    if as_json:
        print(json.dumps(dataclasses.asdict(last), ensure_ascii=False), flush=True)
    else:
        print()
    completion = last.outputs[0]
    if completion.error:
        print(f"apportion: {completion.error}", file=sys.stderr)
    return Answer(completion.text, completion.error)
