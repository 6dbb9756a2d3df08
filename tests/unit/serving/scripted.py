"""The API process without an engine: the model's answer is a script, cut into pieces at will."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from starlette.testclient import TestClient

import apportion
from apportion.core.config import EngineConfig, ModelConfig
from apportion.core.outputs import SequenceDelta
from apportion.processor.tokenizer import Tokenizer
from apportion.serving.api_server import make_app
from apportion.serving.config import ServeConfig
from apportion.serving.messages import Finished, ModelInfo, ModelState
from apportion.serving.metrics import Metrics
from apportion.serving.server import Server
from apportion.serving.stream import Stream

MODEL = Path(apportion.__file__).parent / "assets" / "dense"
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
THINKING = PLAIN + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
OPEN_THINKING = PLAIN + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"


FRAGMENTS = [
    *(
        "Well, ",
        "é🙂\n",
        "<think>",
        "</think>",
        "hm ",
        "  ",
        "<tool_call>",
        "</tool_call>",
        "{",
        "[TOOL_CALLS]",
        "f[ARGS]{}",
        "<|python_tag|>",
    ),
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par\\u0131s \\"x\\""}}\n</tool_call>',
    '{"name": "f", "arguments": {"a": [1, "}"]}}',
    '[{"name": "f", "arguments": {}}]',
    '{"name": "f", "parameters": {"x": null}}',
    "; ",
]
# What models write, mangled: marks of all formats, calls, halves of them.
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
places = st.lists(st.integers(0, 400), max_size=20)


@cache
def bundled_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MODEL)


@dataclass
class ScriptedEngine:
    """pieces: of the text. seen: the requests that came. error: instead of an end."""

    tokenizer: Tokenizer
    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_reason: int | str | None = None
    seen: list = field(default_factory=list)

    def start(self) -> None:
        self._tasks: set[asyncio.Task] = set()

    async def stop(self, *, at_once: bool = False) -> None:
        await asyncio.gather(*self._tasks)

    def abort(self, stream: Stream) -> None: ...

    async def generate(self, requests) -> Stream:
        self.seen += requests
        stream = Stream(requests)
        for request in requests:
            stream.accept(request.request_id)
        task = asyncio.create_task(self._answer(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _answer(self, stream: Stream) -> None:
        [request] = stream.requests
        tokens = self.tokenizer.encode("".join(self.pieces))
        pieces = self.pieces if request.stream else ["".join(self.pieces)]
        ends = [len(tokens) * (i + 1) // len(pieces) for i in range(len(pieces))]
        for index, (piece, start, end) in enumerate(zip(pieces, [0, *ends], ends, strict=False)):
            is_last = index == len(pieces) - 1
            delta = SequenceDelta(request.request_id, 0, piece, tokens[start:end])
            if is_last:
                delta.finish_reason, delta.stop_reason = self.finish_reason, self.stop_reason
                delta.error = "it broke" if self.finish_reason == "error" else None
                stream.end(Finished(request.request_id, num_cached_tokens=3))
            stream.put(delta)
            stream.wake()
            while stream._pending and request.stream and not is_last:  # until it is read, so that pieces stay pieces
                await asyncio.sleep(0)


class Script:
    """A client of an app whose engine answers what it is told to. template: the model's; parser: of tool calls."""

    def __init__(self, template: str = PLAIN, parser: str = "hermes", **config: object) -> None:
        tokenizer = bundled_tokenizer().with_chat_template(template)
        self.engine = ScriptedEngine(tokenizer)
        serve = ServeConfig(
            models={"m": str(MODEL)}, preload=("m",), version="0", tool_call_parser=parser, disable_access_log=True, **config
        )
        self.server = Server(serve, EngineConfig(models=(ModelConfig(model=str(MODEL), name="m"),)), self.engine, Metrics())
        self.server.models = {"m": ModelInfo("m", str(MODEL), ModelState.LOADED, max_model_len=2048, vocab_size=tokenizer.vocab_size)}
        self.server.tokenizers = {"m": tokenizer}
        self.http = TestClient(make_app(self.server), raise_server_exceptions=False)
        self.http.__enter__()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.__exit__(None, None, None)

    def plays(self, *pieces: str, finish_reason: str = "stop", stop_reason: str | None = None) -> None:
        self.engine.pieces, self.engine.finish_reason, self.engine.stop_reason = list(pieces) or [""], finish_reason, stop_reason

    def post(self, path: str, **body: object):
        return self.http.post(path, json=body)

    def events(self, path: str, **body: object) -> list[tuple[str, dict]]:
        """Of a stream: each event's name and data; what is no JSON has none."""
        answer = self.post(path, **body, stream=True)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = []
        for block in answer.text.removesuffix("\n\n").split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.split("\n"))
            found.append((lines.get("event", ""), {} if lines["data"] == "[DONE]" else json.loads(lines["data"])))
        return found


@cache
def script(template: str = PLAIN, parser: str = "hermes") -> Script:
    return Script(template, parser)


def cut(text: str, places: list[int]) -> list[str]:
    """`text` in pieces, cut at `places` (taken modulo its length)."""
    ends = sorted({place % len(text) for place in places} | {0, len(text)}) if text else [0, 0]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def without(value, names: set[str]):
    """A JSON value without the fields that two answers to the same question never share."""
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    return [without(item, names) for item in value] if isinstance(value, list) else value
