"""The API process: the app with its routes, and running it. Imports neither torch nor transformers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from apportion.core.errors import ApportionError
from apportion.serving.dashboard import routes as dashboard
from apportion.serving.event_stream import ClientGone
from apportion.serving.gate import Gate
from apportion.serving.protocol.anthropic_output import error_body
from apportion.serving.protocol.errors import HttpError, from_validation, to_http
from apportion.serving.routes import anthropic, chat, completions, embeddings, health, models, responses, tokenize
from apportion.serving.server import Server

logger = logging.getLogger(__name__)

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    models.router,
    completions.router,
    chat.router,
    responses.router,
    anthropic.router,
    embeddings.router,
    tokenize.router,
    dashboard.router,
)
PUBLIC_PATHS: frozenset[str] = health.PUBLIC_PATHS | dashboard.PUBLIC_PATHS  # need no key

# A path's beginning -> its error body, where it is not OpenAI's.
ERROR_BODIES: Mapping[str, Callable[[HttpError], dict[str, Any]]] = {"/v1/messages": error_body}

# Any route may answer these; a body that does not fit is a 400 here, not FastAPI's 422.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "the request is wrong; the error names the field"},
    401: {"description": "no valid API key"},
    404: {"description": "no such model"},
    408: {"description": "the body did not arrive in time"},
    413: {"description": "the body is too large"},
    429: {"description": "the queue is full; try again after Retry-After seconds"},
    503: {"description": "the engine is starting, dead or out of memory; try again after Retry-After seconds"},
    504: {"description": "the request took longer than the server allows"},
}


def make_app(server: Server) -> FastAPI:
    """The app over a server that is not yet started; its lifespan starts and stops the engine's supervision."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        server.engine.start()
        yield
        await server.engine.stop()
        if server.tracer is not None:
            await asyncio.to_thread(server.tracer.close)

    app = FastAPI(
        title="apportion",
        version=server.config.version,
        lifespan=lifespan,
        root_path=server.config.root_path,
        redirect_slashes=False,
        docs_url=None,  # its pages would be fetched from elsewhere
        redoc_url=None,
    )
    app.state.server = server
    for router in ROUTERS:
        app.include_router(router, responses=ERROR_RESPONSES)
    if server.config.metrics_port is None:
        app.include_router(health.metrics_router, responses=ERROR_RESPONSES)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    for kind in (HttpError, ApportionError, TimeoutError, RequestValidationError, HTTPException, ClientGone, Exception):
        app.add_exception_handler(kind, _handle)
    app.add_middleware(Gate, config=server.config, metrics=server.metrics, is_public=PUBLIC_PATHS.__contains__, respond=respond)
    if server.config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.config.allowed_origins,
            allow_methods=server.config.allowed_methods,
            allow_headers=server.config.allowed_headers,
            allow_credentials=server.config.allow_credentials,
            expose_headers=["x-request-id"],
        )
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The specification, without the status that is never sent."""
    if app.openapi_schema is None:
        spec = get_openapi(title=app.title, version=app.version or "0", routes=app.routes)
        for path in spec["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            spec.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = spec
    return app.openapi_schema


async def _handle(request: Request, error: Exception) -> Response:
    return respond(request.url.path, _as_http(error))


def _as_http(error: Exception) -> HttpError:
    match error:
        case RequestValidationError():
            return from_validation(error.errors(), error.body)
        case HTTPException():
            cause = error.__cause__ or error.__context__
            if isinstance(cause, HttpError):  # raised while the body was read
                return cause
            message = "the body is not valid JSON in UTF-8" if error.status_code == 400 else str(error.detail)
            return HttpError(error.status_code, message)
        case ClientGone():
            return HttpError(499, "the client has gone")
    told = to_http(error)
    if told.status == 500:
        logger.error("a request failed: %s", told.message, exc_info=error)
    return told


def respond(path: str, error: HttpError) -> Response:
    """The error in the shape that clients of `path` expect."""
    body = next((make for start, make in ERROR_BODIES.items() if path.startswith(start)), HttpError.body)
    return Response(msgspec.json.encode(body(error)), error.status, headers=error.headers, media_type="application/json")
