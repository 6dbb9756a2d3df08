"""Runs the app under uvicorn: signals, draining, and /metrics on an address of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import TextIO

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Route

from apportion.core.config import EngineConfig
from apportion.core.errors import InvalidParameter
from apportion.serving.api_server import make_app
from apportion.serving.config import ServeConfig
from apportion.serving.engine_link import EngineLink
from apportion.serving.logs import set_up_logs
from apportion.serving.metrics import Metrics
from apportion.serving.routes.health import prometheus
from apportion.serving.run import url
from apportion.serving.server import Server, make_server

logger = logging.getLogger(__name__)

LAST_WORDS_S = 2  # to tell clients that their time is up


def serve(
    config: ServeConfig,
    engine: EngineConfig,
    link: EngineLink,
    make_link: Callable[[], EngineLink],
    listener: socket.socket,
    metrics_listener: socket.socket | None,
    log: TextIO | None,
) -> str | None:
    """Until a signal or the engine's last death; returns what the server failed of, None when it was told to end."""
    metrics = Metrics(config.metrics_prefix)
    set_up_logs("api", config.log_format, log, metrics.lost_log_lines.inc)
    server = make_server(config, engine, link, make_link, metrics, lambda: http.stop())
    try:
        http = HttpServer(_uvicorn_config(config, make_app(server)), server)
    except (OSError, ssl.SSLError) as error:
        raise InvalidParameter(f"TLS cannot be set up from {config.ssl_certfile} and {config.ssl_keyfile}: {error}") from error
    logger.info("serving %s", url(config, listener))
    with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
        runner.run(_serve(http, listener, server, metrics_listener))
    return server.exit_reason


class HttpServer(uvicorn.Server):
    """The first signal drains, the second ends everything at once, whichever they are."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    def stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Those whose time is up are told so, rather than cut off."""
        late = asyncio.get_running_loop().call_later(self._server.config.shutdown_timeout, self._server.engine.give_up)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            self._server.engine.kill()
        else:
            logger.info("draining: running requests have %g s", self._server.config.shutdown_timeout)
        self.should_exit = True


class MetricsServer(uvicorn.Server):
    """Leaves signals to the main one."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


async def _serve(http: HttpServer, listener: socket.socket, server: Server, metrics_listener: socket.socket | None) -> None:
    if metrics_listener is None:
        await http.serve([listener])
        return
    app = Starlette(routes=[Route("/metrics", prometheus)])
    app.state.server = server
    beside = MetricsServer(uvicorn.Config(app, access_log=False, log_config=None, timeout_graceful_shutdown=1))
    task = asyncio.create_task(beside.serve([metrics_listener]))
    await http.serve([listener])
    beside.should_exit = True
    await task


def _uvicorn_config(config: ServeConfig, app: FastAPI) -> uvicorn.Config:
    loaded = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=math.ceil(config.shutdown_timeout) + LAST_WORDS_S,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
    )
    loaded.load()
    return loaded
