"""What the generating endpoints share: handing requests to the engine, time limits, errors inside a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from apportion.core.outputs import SequenceDelta
from apportion.core.pooling_params import PoolingParams
from apportion.core.sampling_params import SamplingParams
from apportion.serving.event_stream import DONE, EventStream, encode_json, event, while_client_waits
from apportion.serving.messages import Generate
from apportion.serving.protocol.errors import HttpError, to_http
from apportion.serving.server import Prompt, ServedModel, Server
from apportion.serving.stream import Stream
from apportion.serving.tracing import trace_headers


def openai_failure(error: HttpError) -> bytes:
    return event(error.body()) + DONE


class Generation:
    """The engine's work for one HTTP request; what still runs when it is answered, or its client has gone, is aborted.

    streamed: whether news is wanted as it comes.
    """

    def __init__(
        self,
        server: Server,
        request: Request,
        model: ServedModel,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        streamed: bool,
        priority: int = 0,
        cache_salt: str | None = None,
        pooling_params: PoolingParams | None = None,
    ) -> None:
        self.request_id: str = request.scope["state"]["request_id"]
        self._arrival_s: float = request.scope["state"]["arrival_s"]
        self._trace_headers = trace_headers(request.headers) if server.tracer is not None else {}
        self._server, self._request = server, request
        own_id = uuid4().hex  # clients may give two requests one id
        self._requests = [
            Generate(
                request_id=f"{own_id}-{i}",
                model=model.name,
                prompt_token_ids=token_ids,
                params=params,
                stream=streamed,
                arrival_s=self._arrival_s,
                prompt=text,
                priority=priority,
                cache_salt=cache_salt or "",
                pooling_params=pooling_params,
            )
            for i, (token_ids, text) in enumerate(prompts)
        ]
        self.stream: Stream | None = None

    async def open(self) -> Stream:
        """Returns once the engine has accepted everything. Errors: those of AsyncEngine.generate."""
        self.stream = await self._server.engine.generate(self._requests)
        return self.stream

    def close(self) -> None:
        if self.stream is not None:
            self._server.engine.abort(self.stream)
        if self._server.tracer is not None:
            self._server.tracer.record(self.request_id, self._arrival_s, self._trace_headers, self._requests, self.stream)

    async def answer(self, make: Callable[[Stream, list[SequenceDelta]], object]) -> Response:
        """Everything at once, as `make` shapes it."""

        async def work() -> bytes:
            async with asyncio.timeout(self._server.time_left(self._request)):
                stream = await self.open()
                whole = await stream.collect()
            _raise_failures(whole)
            return encode_json(make(stream, whole))

        try:
            body = await while_client_waits(self._request.receive, work())
        finally:
            self.close()
        return Response(body, media_type="application/json")

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self._requests)

    async def events(
        self, pieces: Callable[[Stream], AsyncGenerator[bytes, None]], failure: Callable[[HttpError], bytes] = openai_failure
    ) -> EventStream:
        """What `pieces` makes of the stream; `failure` its end, when it cannot go on. Raises what the engine refuses the request with
        before anything is sent."""
        try:
            async with asyncio.timeout(self._server.time_left(self._request)):
                stream = await while_client_waits(self._request.receive, self.open())
        except BaseException:
            self.close()
            raise
        return EventStream(self._guarded(pieces(stream), failure), self.close)

    async def _guarded(self, pieces: AsyncGenerator[bytes, None], failure: Callable[[HttpError], bytes]) -> AsyncGenerator[bytes, None]:
        """The stream's errors as an event: its status has been sent."""
        try:
            async with aclosing(pieces), asyncio.timeout(self._server.time_left(self._request)):
                async for piece in pieces:
                    yield piece
        except (Exception, TimeoutError) as error:
            yield failure(to_http(error))


def raise_failure(delta: SequenceDelta) -> None:
    """A sequence that failed is an error of the whole request. Errors: HttpError."""
    if delta.finish_reason == "error":
        raise HttpError(500, delta.error or "the request failed", code="generation_failed")


def _raise_failures(deltas: Sequence[SequenceDelta]) -> None:
    for delta in deltas:
        raise_failure(delta)
