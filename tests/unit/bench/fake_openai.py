"""A small OpenAI-compatible server with known timing and known faults, to hold the benchmark's client to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeServer:
    """first, gap: seconds before the first token and between the rest. tokens_per_chunk: how many come at once. fault: given the
    number of a request, the name of what goes wrong with it: "500", "cut" (mid-stream), "error" (an event), "hang", "junk"."""

    first: float = 0.0
    gap: float = 0.0
    tokens_per_chunk: int = 1
    usage: bool = True
    fault: Callable[[int], str | None] = lambda number: None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    running: int = 0
    peak: int = 0
    url: str = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeServer]:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                body = await reader.readexactly(length)
                await self._answer(head.split()[1].decode(), body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            self._whole(writer, 200, {"object": "list", "data": [{"id": "fake"}]})
            return
        fields = json.loads(body)
        number = len(self.bodies)
        self.bodies.append(fields)
        fault = self.fault(number)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            if fault == "500":
                self._whole(writer, 500, {"error": {"message": "the engine is down", "type": "server_error"}})
            else:
                await self._stream(writer, fields, chat="chat" in path, fault=fault)
        finally:
            self.running -= 1

    def _whole(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        text = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)

    async def _stream(self, writer: asyncio.StreamWriter, fields: dict[str, Any], chat: bool, fault: str | None) -> None:
        num_tokens = fields.get("max_tokens") or fields["max_completion_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n")
        if chat:  # sent at once, before any token is there: no first token
            self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        await asyncio.sleep(self.first)
        for i in range(0, num_tokens, self.tokens_per_chunk):
            if i:
                await asyncio.sleep(self.gap)
            if i and fault == "cut":
                writer.close()
                return
            if i and fault == "hang":
                await asyncio.sleep(3600)
            if fault == "junk":
                self._event(writer, "{")
            if fault == "error":
                self._event(writer, {"error": {"message": "out of blocks"}})
                break
            text = "é" * min(self.tokens_per_chunk, num_tokens - i)
            choice = {"delta": {"content": text}} if chat else {"text": text}
            self._event(writer, {"choices": [{"index": 0, **choice, "finish_reason": None}]})
        last = {"delta": {}} if chat else {"text": ""}
        self._event(writer, {"choices": [{"index": 0, **last, "finish_reason": "length"}]})
        if self.usage:
            self._event(writer, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": num_tokens}})
        self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, event: Any) -> None:
        """Split in two HTTP chunks, with a comment before: a reader may rely on neither."""
        text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
        data = f": ping\r\ndata: {text}\r\n\r\n".encode()
        for piece in (data[:9], data[9:]):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
