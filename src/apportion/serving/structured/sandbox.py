"""The process that tries grammars: `python -m apportion.serving.structured.sandbox SOCKET`.

It holds the tokenizers and forks a child for every grammar, so that a bomb ends a child by its alarm or its memory limit and nothing
else: no grammar waits for another, none leaves anything behind. Each request arrives as one end of a socket pair over SOCKET and is
answered on it; no answer means that the child died. Imports neither torch nor numpy.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any

from llguidance import LLMatcher, LLTokenizer, grammar_from

from apportion.core.structured_outputs import JSON_WHITESPACE
from apportion.serving.structured.limits import REHEARSED_TOKENS, CompileLimits, parser_limits

HEADER = struct.Struct("!Q")


class GrammarError(ValueError):
    """One sentence on what is wrong with a grammar."""


def make_tokenizer(description: dict[str, Any]) -> LLTokenizer:
    """description: 'json' (a tokenizer.json as text), 'vocab' (tokens the model knows), 'eos' (token ids). Raises ValueError."""
    return LLTokenizer(description["json"], n_vocab=description["vocab"] or None, eos_token=description["eos"] or None)


def to_grammar(kind: str, source: str, prefix: str | None = None) -> str:
    """What llguidance reads. Arguments: as StructuredOutputsParams has them. Errors: GrammarError."""
    if prefix is not None:
        grammar = to_grammar(kind, source)
        body, *more = json.loads(grammar)["grammars"] if kind == "json" else [{"lark_grammar": grammar}]
        return json.dumps({"grammars": [{"lark_grammar": f"start: prefix @body\n{prefix}"}, {**body, "name": "body"}, *more]})
    try:
        if kind == "json":
            return LLMatcher.grammar_from_json_schema(source, defaults={"whitespace_pattern": JSON_WHITESPACE})
        return grammar_from(kind, source)  # type: ignore[arg-type]  # every kind of ours is a format of theirs
    except ValueError as error:
        raise GrammarError(reason(str(error))) from error


def make_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher that has computed its first mask. Errors: GrammarError."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(reason(matcher.get_error()))
    return matcher


def rehearse(matcher: LLMatcher) -> None:
    """Follow the grammar for some tokens. Errors: GrammarError."""
    for _ in range(REHEARSED_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if mask and not matcher.is_stopped():
            matcher.consume_token((mask & -mask).bit_length() - 1)
        if matcher.is_error():
            raise GrammarError(reason(matcher.get_error()))


def reason(message: str) -> str:
    """One line of what llguidance says: the first, and the one that a nested parser calls the error."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    if not lines[0] or lines[0].startswith("NoExtension"):
        return "no text can satisfy it"
    return " ".join([lines[0], *(line for line in lines[1:] if line.startswith("error: "))])[:500]


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    channel.sendall(HEADER.pack(len(body)) + body)


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """None where the other end has gone."""
    header = _read(channel, HEADER.size)
    body = _read(channel, HEADER.unpack(header)[0]) if header else None
    return None if body is None else json.loads(body)


def _read(channel: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _try(tokenizer: LLTokenizer, request: dict[str, Any]) -> dict[str, Any]:
    """In the child: {'grammar': ..., 'cpu_s': ..., 'bytes': ...}, {'error': ...}, or {'defect': ...} where it is ours."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        grammar = to_grammar(request["kind"], request["source"], request["prefix"])
        rehearse(make_matcher(tokenizer, grammar))
    except GrammarError as error:
        return {"error": str(error)}
    except (RecursionError, MemoryError) as error:
        return {"error": f"it is too large ({type(error).__name__})"}
    except Exception:
        return {"defect": traceback.format_exc()}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"grammar": grammar, "cpu_s": time.process_time(), "bytes": 1024 * max(0, grown)}


def _limit(limits: CompileLimits) -> None:
    """The kernel ends a child that takes too long; an allocation that goes too far ends it too."""
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + limits.num_bytes, size + limits.num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s)


def _answer(channel: socket.socket, tokenizers: dict[str, LLTokenizer]) -> None:
    request = receive(channel)
    if request is None:
        return
    if "tokenizer" in request:
        try:
            tokenizers[request["name"]] = make_tokenizer(request["tokenizer"])
            send(channel, {})
        except ValueError as error:
            send(channel, {"error": reason(str(error))})
        return
    if os.fork() == 0:
        _limit(CompileLimits(**request["limits"]))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a child of a bomb says in its last moment
        send(channel, _try(tokenizers[request["name"]], request))
        os._exit(0)


def main(control_fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    control = socket.socket(fileno=control_fd)
    tokenizers: dict[str, LLTokenizer] = {}
    while True:
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not fds:
            return  # the parent has gone
        with socket.socket(fileno=fds[0]) as channel:
            _answer(channel, tokenizers)


if __name__ == "__main__":
    main(int(sys.argv[1]))
