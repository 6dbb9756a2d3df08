"""Server-sent events as an ASGI response, and waiting for an answer only as long as the client does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that collected events would defeat them
]


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(data) + b"\n\n"


def named_event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event that has a name."""
    return f"event: {name}\n".encode() + event(data)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class EventStream(Response):
    """Sends each piece that `events` yields. When the client goes away the generator is closed where it stands. close: called at the end,
    however far it came."""

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self.status_code, self.background, self.raw_headers = 200, None, list(HEADERS)
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_client_waits(receive, self._send(send))
        except ClientGone:
            pass  # it is logged as a request without an end; there is nobody to answer
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()


async def while_client_waits(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled when the client disconnects, and ClientGone raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for other in (task, gone):
            if not other.done():
                other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
