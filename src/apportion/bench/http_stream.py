"""HTTP/1.1 requests whose answers are watched as they arrive, for as little CPU as Python takes.

A benchmark's client shares the machine with what it measures, so a chunk must cost it microseconds: httptools' C parser feeds a
callback straight from the socket's own, with the time at which the bytes were read. Measured per chunk under uvloop: 18 us, where
aiohttp costs 25 and httpx over 100. Knows nothing of OpenAI's messages.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from apportion.core.errors import InvalidParameter

OnEvent = Callable[[float, bytes], None]  # (time.perf_counter() of its arrival, the payload after "data:")
IDLE_S = 2.0  # servers close idle connections after five seconds (uvicorn); one that might be closing is not used


@dataclass(slots=True)
class Reply:
    """status: of HTTP. body: what was no event stream. end_time: time.perf_counter() of its last byte."""

    status: int
    body: bytes
    end_time: float


class HttpClient:
    """Keeps connections to one server for further requests, as many as are in flight at once.

    url: http://host:port or https://..., with or without a path, which goes before the path of every request.
    """

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidParameter(f"{url!r} is no URL such as http://127.0.0.1:8000")
        self.host, self.root = parts.hostname, parts.path.rstrip("/")
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        lines = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "apportion-bench", "Accept": "*/*", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: bytes = b"", on_event: OnEvent | None = None) -> Reply:
        """The whole answer; the events of an event stream go to on_event as they come and not into the body.

        Errors: OSError when there is no connection or it ends early. Cancelled: closes the connection.
        """
        connection = self._take() or await self._connect()
        head = f"{method} {self.root}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            reply = await connection.exchange(head.encode() + body, on_event)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.perf_counter() - connection.now < IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self.host, self.port, ssl=self.tls)
        return connection


@dataclass(slots=True, eq=False)
class _Connection(asyncio.Protocol):
    """One connection and the answer on it. now: when its latest bytes were read."""

    transport: asyncio.Transport | None = None
    parser: Any = None
    on_event: OnEvent | None = None
    done: asyncio.Future[Reply] | None = None
    body: bytearray = field(default_factory=bytearray)
    is_stream: bool = False
    framed: bool = False  # the end of the answer shows in it; otherwise it is where the server closes
    reusable: bool = False
    now: float = 0.0

    async def exchange(self, message: bytes, on_event: OnEvent | None) -> Reply:
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self.done = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.on_event, self.body = on_event, bytearray()
        self.is_stream = self.framed = self.reusable = False
        self.transport.write(message)
        return await self.done

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # a TCP connection's is one, uvloop's only in conduct

    def data_received(self, data: bytes) -> None:
        self.now = time.perf_counter()
        if self.done is None or self.done.done():
            self.reusable = False  # bytes that nobody asked for
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
            self.done.set_exception(cause or ConnectionError(f"the server's answer is no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self.done is None or self.done.done():
            return
        if exc is None and not self.framed and self.parser.get_status_code():
            self.done.set_result(self._reply())
        else:
            self.done.set_exception(exc or ConnectionResetError("the server closed the connection before the answer was complete"))

    # the parser's side

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.is_stream = value.startswith(b"text/event-stream")
        elif name in (b"content-length", b"transfer-encoding"):
            self.framed = True

    def on_body(self, piece: bytes) -> None:
        self.body += piece
        if not self.is_stream or self.on_event is None:
            return
        *lines, rest = self.body.split(b"\n")
        self.body = rest
        for line in lines:  # comments (":"), event names and empty lines are not data
            if line.startswith(b"data:"):
                self.on_event(self.now, bytes(line[5:].strip()))

    def on_message_complete(self) -> None:
        self.reusable = self.parser.should_keep_alive()
        if self.done is not None and not self.done.done():
            self.done.set_result(self._reply())

    def _reply(self) -> Reply:
        return Reply(self.parser.get_status_code(), bytes(self.body), self.now)
