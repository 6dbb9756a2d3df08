"""What every HTTP request passes: an id, a key, a limited body, and a line in the log. Plain ASGI, so that a streamed piece costs nothing.

Errors that are found here, before any route, leave in the same shape as a route's.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Callable
from uuid import uuid4

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apportion.serving.config import ServeConfig
from apportion.serving.metrics import Metrics
from apportion.serving.protocol.errors import HttpError

access_log = logging.getLogger(f"{__package__}.access")

ID_HEADER = b"x-request-id"
GOOD_ID = re.compile(r"[\w.:-]{1,64}")
UNLOGGED = frozenset({"/livez", "/readyz", "/health", "/ping", "/metrics", "/stats"})


class Gate:
    """is_public: whether a path needs no key. respond: makes a response of an error, for the path that was asked."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        metrics: Metrics,
        is_public: Callable[[str], bool],
        respond: Callable[[str, HttpError], Response],
    ) -> None:
        self._app, self._config, self._metrics = app, config, metrics
        self._is_public, self._respond = is_public, respond
        self._keys = [key.encode() for key in config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state["request_id"], state["arrival_s"] = request_id, time.monotonic()
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (ID_HEADER, request_id.encode())]
            await send(message)

        try:
            error = self._refusal(scope, headers)
            if error is not None:
                await self._respond(scope["path"], error)(scope, receive, send_named)
            else:
                await self._app(scope, _LimitedBody(receive, self._config).receive, send_named)
        finally:
            self._log(scope, status, request_id, time.monotonic() - state["arrival_s"])

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> HttpError | None:
        if self._keys and scope["method"] != "OPTIONS" and not self._is_public(scope["path"]) and not self._has_key(headers):
            return HttpError(401, "a valid API key is needed: send Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            return too_large(self._config.max_body_bytes)
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        """Also in x-api-key, where Anthropic's clients put it."""
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return any(hmac.compare_digest(given, key) for key in self._keys)

    def _log(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "unmatched"  # a label must not grow with what strangers ask for
        self._metrics.http_requests.labels(scope["method"], path, str(status or 499)).inc()
        if self._config.disable_access_log or scope["path"] in UNLOGGED:
            return
        client = scope.get("client") or ("", 0)
        fields = {
            "request_id": request_id,
            "client": client[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": status or 499,
            "ms": round(seconds * 1e3, 1),
            **scope["state"].get("log", {}),
        }
        access_log.info("%s %s %d", scope["method"], scope["path"], status or 499, extra={"fields": fields})


class _LimitedBody:
    """A body of at most so many bytes that has arrived within so many seconds. Afterwards waiting is free: it is for a disconnect."""

    def __init__(self, receive: Receive, config: ServeConfig) -> None:
        self._receive = receive
        self._left, self._limit = config.max_body_bytes, config.max_body_bytes
        self._timeout = config.body_timeout
        self._deadline = time.monotonic() + config.body_timeout
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HttpError(408, f"the body did not arrive within {self._timeout:g} s", code="body_timeout") from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise too_large(self._limit)
            self._complete = not message.get("more_body", False)
        return message


def too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than the {limit} bytes that the server takes", code="body_too_large")


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own, if it can stand in a log and a header."""
    given = headers.get(ID_HEADER, b"").decode("latin-1")
    return given if GOOD_ID.fullmatch(given) else uuid4().hex
