"""Grammars on demand: tried in the sandbox, compiled here, kept for whoever asks for the same."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from apportion.core.errors import InternalError, InvalidParameter, Unsupported
from apportion.core.grammar import Grammar
from apportion.core.structured_outputs import StructuredOutputsParams
from apportion.processor.tokenizer import Tokenizer
from apportion.serving.structured.limits import CompileLimits
from apportion.serving.structured.matcher import MatcherGrammar
from apportion.serving.structured.sandbox import GrammarError, make_matcher, make_tokenizer, receive, send

NAMES = {"json": "the JSON schema", "regex": "the regular expression", "choice": "the list of choices", "grammar": "the grammar"}
MAX_KEPT = 256
MAX_KEPT_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """Call `start` for each sequence that shall follow it. num_bytes: about what it holds."""

    _matcher: LLMatcher
    _mask: bytes
    _threads: ThreadPoolExecutor
    num_bytes: int

    def start(self) -> Grammar:
        return MatcherGrammar(self._matcher.deep_copy(), self._mask, self._threads)


class GrammarCompiler:
    """Thread-safe. Close it, or let it go: its processes end with it."""

    def __init__(self, limits: CompileLimits = CompileLimits()) -> None:  # noqa: B008 - it is frozen
        self._descriptions: dict[str, dict[str, Any]] = {}
        self._tokenizers: dict[str, LLTokenizer] = {}
        self._kept: OrderedDict[bytes, Future[CompiledGrammar]] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._sandbox = _Sandbox(limits)
        self._compilers = ThreadPoolExecutor(4, "grammar-compiler")
        self._masks = ThreadPoolExecutor(1, "grammar-masks")
        self.close = weakref.finalize(self, _close, self._sandbox, self._compilers, self._masks)

    def add_model(self, name: str, tokenizer: Tokenizer, vocab: int, eos_token_ids: Sequence[int]) -> None:
        """vocab: tokens the model knows. Nothing is computed before the first grammar."""
        description = {"json": tokenizer.backend.to_str(), "vocab": max(vocab, tokenizer.vocab_size), "eos": list(eos_token_ids)}
        with self._lock:
            self._descriptions[name] = description

    def remove_model(self, name: str) -> None:
        with self._lock:
            for table in (self._descriptions, self._tokenizers):
                table.pop(name, None)
            self._kept.clear()
        self._sandbox.forget(name)

    def compile(self, model: str, params: StructuredOutputsParams) -> CompiledGrammar:
        """Errors: InvalidParameter with what is wrong with it; Unsupported where the model's tokenizer cannot be constrained."""
        return self.submit(model, params).result()

    def submit(self, model: str, params: StructuredOutputsParams) -> Future[CompiledGrammar]:
        """`compile` without waiting."""
        kind, source, prefix = params.kind, params.source, params.prefix
        key = blake2b(repr((model, kind, source, prefix)).encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            known = self._kept.get(key)
            if known is None:
                known = self._kept[key] = self._compilers.submit(self._compile, model, kind, source, prefix)
                known.add_done_callback(lambda future: self._trim(key, future))
            self._kept.move_to_end(key)
        return known

    def _trim(self, key: bytes, done: Future[CompiledGrammar]) -> None:
        """Forget what has not been asked for longest. What failed is tried again when it comes again."""
        with self._lock:
            if done.cancelled() or done.exception() is not None:
                self._kept.pop(key, None)
            held = sum(future.result().num_bytes for future in self._kept.values() if future.done() and not future.exception())
            for oldest in list(self._kept):
                future = self._kept[oldest]
                if len(self._kept) <= MAX_KEPT and held <= MAX_KEPT_BYTES:
                    return
                if future.done() and not future.exception():
                    held -= future.result().num_bytes
                    del self._kept[oldest]

    def _compile(self, model: str, kind: str, source: str, prefix: str | None) -> CompiledGrammar:
        tokenizer = self._tokenizer(model)
        verdict = self._sandbox.ask(model, self._descriptions[model], {"kind": kind, "source": source, "prefix": prefix})
        if "error" in verdict:
            raise InvalidParameter(f"{NAMES[kind]} cannot be used: {verdict['error']}")
        try:
            matcher = make_matcher(tokenizer, verdict["grammar"])
        except GrammarError as error:
            raise InternalError(f"{NAMES[kind]} compiled in the sandbox and not here: {error}") from error
        return CompiledGrammar(matcher, matcher.compute_bitmask(), self._masks, verdict["bytes"])

    def _tokenizer(self, model: str) -> LLTokenizer:
        with self._tokenizer_lock:  # a large vocabulary takes a second
            if model not in self._tokenizers:
                try:
                    self._tokenizers[model] = make_tokenizer(self._descriptions[model])
                except ValueError as error:
                    raise Unsupported(f"the tokenizer of model {model!r} cannot be constrained by a grammar: {error}") from error
            return self._tokenizers[model]


class _Sandbox:
    """The other side of sandbox.py. The process is started when it is needed, and again when it has gone."""

    def __init__(self, limits: CompileLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._known: set[str] = set()

    def ask(self, model: str, tokenizer: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._start()
            if model not in self._known:
                self._exchange({"tokenizer": tokenizer, "name": model})
                self._known.add(model)
            channel = self._open()
        with channel:
            send(channel, {**request, "name": model, "limits": asdict(self._limits)})
            channel.settimeout(self._limits.wall_s + 10)
            try:
                answer = receive(channel)
            except TimeoutError:
                answer = None
        if answer is None:
            return {"error": f"compiling it takes more than it may ({self._limits})"}
        if "defect" in answer:
            raise InternalError(f"a grammar could not be tried: {answer['defect']}")
        return answer

    def forget(self, model: str) -> None:
        with self._lock:
            self._known.discard(model)

    def close(self) -> None:
        with self._lock:
            if self._control is not None:
                self._control.close()
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            self._process = self._control = None

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._known.clear()
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "apportion.serving.structured.sandbox", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def _open(self) -> socket.socket:
        """A channel for one request."""
        mine, theirs = socket.socketpair()
        with theirs:
            if self._control is None:
                raise InternalError("the grammar sandbox is closed")
            socket.send_fds(self._control, [b"."], [theirs.fileno()])
        return mine

    def _exchange(self, message: dict[str, Any]) -> None:
        with self._open() as channel:
            send(channel, message)
            answer = receive(channel)
        if answer is None or "error" in answer:
            raise InternalError(f"the grammar sandbox does not take a tokenizer that this process takes: {answer}")


def _close(sandbox: _Sandbox, *pools: ThreadPoolExecutor) -> None:
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)
    sandbox.close()
