"""OpenAI's batch files: each line a request, each answered by a line. The server's own app answers, called without a network.

A line is {"custom_id", "method": "POST", "url", "body"}; its answer {"id", "custom_id", "response": {"status_code", "request_id", "body"},
"error"}. Answers are written as they are finished, so that what was done stays when the rest is cut off.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from starlette.types import ASGIApp, Message

from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.core.keywords import resolve_keywords
from apportion.serving.api_server import make_app
from apportion.serving.async_engine import EngineDead
from apportion.serving.config import ServeConfig
from apportion.serving.engine_link import EngineLink
from apportion.serving.logs import set_up_logs
from apportion.serving.metrics import Metrics
from apportion.serving.server import Server, make_server

TRY_AGAIN = (429, 503)  # the queue is full, the engine is starting again
MAX_TRIES = 20
TRY_AGAIN_S = 1.0


def run_batch(config: ServeConfig, source: Path, target: Path, max_concurrency: int) -> tuple[int, int]:
    """How many lines were answered, and how many failed.

    Errors: InvalidParameter for files that cannot be read or written; EngineDead when the engine cannot be started or kept alive.
    """
    if max_concurrency < 1:
        raise InvalidParameter(f"max_concurrency must be at least 1, got {max_concurrency}")
    config = replace(config, disable_access_log=True)
    engine = resolve_keywords([ModelConfig(model=path, name=name) for name, path in config.models.items()], **config.engine)
    with ExitStack() as stack:
        lines = stack.enter_context(_opened(source, "rb"))
        answers = stack.enter_context(_opened(target, "wb"))
        make_link = partial(EngineLink, config, engine)
        link = make_link()
        stack.callback(link.stop)
        metrics = Metrics()
        set_up_logs("api", config.log_format)
        ended = asyncio.Event()
        server = make_server(config, engine, link, make_link, metrics, ended.set)
        try:
            return asyncio.run(_Batch(server, ended, answers, max_concurrency).run(lines))
        except* OSError as errors:
            raise InvalidParameter(f"the answers cannot be written to {target}: {errors.exceptions[0]}") from errors


class _Batch:
    """ended: set when the server cannot go on."""

    def __init__(self, server: Server, ended: asyncio.Event, answers: BinaryIO, max_concurrency: int) -> None:
        self._server, self._ended, self._answers = server, ended, answers
        self._app = make_app(server)
        self._places = asyncio.Semaphore(max_concurrency)
        self._answered = self._failed = 0

    async def run(self, lines: BinaryIO) -> tuple[int, int]:
        async with self._app.router.lifespan_context(self._app):
            while not self._server.engine.is_ready and not self._ended.is_set():
                await asyncio.sleep(0.02)
            async with asyncio.TaskGroup() as tasks:
                for number, line in _numbered(lines):
                    await self._places.acquire()
                    if self._ended.is_set():
                        break
                    tasks.create_task(self._answer(number, line))
        if self._ended.is_set():
            raise EngineDead(f"the engine could not be kept alive: {self._server.exit_reason}")
        return self._answered, self._failed

    async def _answer(self, number: int, line: bytes) -> None:
        try:
            answer = await self._answered_line(number, line)
            response = answer["response"]
            self._answered += response is not None and response["status_code"] == 200
            self._failed += response is None or response["status_code"] != 200
            self._answers.write(json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n")
            self._answers.flush()
        finally:
            self._places.release()

    async def _answered_line(self, number: int, line: bytes) -> dict[str, Any]:
        answer: dict[str, Any] = {"id": f"batch_req_{uuid4().hex}", "custom_id": None, "response": None, "error": None}
        try:
            request = json.loads(line)
            answer["custom_id"] = request.get("custom_id") if isinstance(request, dict) else None
            url, body = _checked(request)
        except ValueError as error:
            return {**answer, "error": {"code": "invalid_line", "message": f"line {number}: {error}"}}
        request_id = uuid4().hex
        for _ in range(MAX_TRIES):
            status, content = await _post(self._app, url, body, request_id)
            if status not in TRY_AGAIN or self._ended.is_set():
                break
            await asyncio.sleep(TRY_AGAIN_S)
        return {**answer, "response": {"status_code": status, "request_id": request_id, "body": json.loads(content)}}


def _checked(request: Any) -> tuple[str, bytes]:
    """url and body. Errors: ValueError, JSONDecodeError among them."""
    if not isinstance(request, dict):
        raise ValueError("not an object")
    if unknown := request.keys() - {"custom_id", "method", "url", "body"}:
        raise ValueError(f"unknown field {min(unknown)!r}")
    if missing := {"custom_id", "url", "body"} - request.keys():
        raise ValueError(f"the field {min(missing)!r} is missing")
    url, body = request["url"], request["body"]
    if request.get("method", "POST") != "POST" or not isinstance(url, str) or not url.startswith("/v1/"):
        raise ValueError("method must be POST and url a path that begins with /v1/")
    if not isinstance(body, dict):
        raise ValueError("body must be an object")
    if body.get("stream"):
        raise ValueError("body has stream, and a file has nobody to stream to")
    return url, json.dumps(body).encode()


async def _post(app: ASGIApp, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
    """Status and content of the app's answer."""
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("batch", 0), "server": ("batch", 0),
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())],
    }  # fmt: skip
    arriving: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, content = 500, bytearray()

    async def receive() -> Message:
        if arriving:
            return arriving.pop()
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never  # nobody disconnects

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            content.extend(message.get("body", b""))

    await app(scope, receive, send)
    return status, bytes(content)


def _numbered(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _opened(path: Path, mode: str) -> BinaryIO:
    try:
        return path.open(mode)  # type: ignore[return-value]
    except OSError as error:
        raise InvalidParameter(f"the batch file {path} cannot be opened: {error.strerror}") from error
