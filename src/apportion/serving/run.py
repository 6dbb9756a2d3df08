"""From a ServeConfig to a server that runs until it is told to stop. What takes long to import comes after the engine has been started."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from functools import partial
from typing import TextIO

from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.core.keywords import resolve_keywords
from apportion.serving.config import ServeConfig
from apportion.serving.engine_link import EngineLink

logger = logging.getLogger(__name__)

EXIT_FAILED = 3  # the engine could not be started or kept alive


def run(config: ServeConfig) -> int:
    """Serve. Returns the exit code. Errors: InvalidParameter when an address or a file cannot be had; those of `resolve_keywords`."""
    engine = resolve_keywords([ModelConfig(model=path, name=name) for name, path in config.models.items()], **config.engine)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_opened(config.log_file)) if config.log_file else None
        listener = stack.enter_context(_bound(config.host, config.port, config.uds))
        beside = None
        if config.metrics_port is not None:
            beside = stack.enter_context(_bound(config.metrics_host, config.metrics_port))
        make_link = partial(EngineLink, config, engine, log)
        link = make_link()
        stack.callback(link.stop, at_once=True)
        from apportion.serving.http_server import serve

        exit_reason = serve(config, engine, link, make_link, listener, beside, log)
    if exit_reason is not None:
        print(f"apportion: {exit_reason}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def url(config: ServeConfig, listener: socket.socket) -> str:
    """Where clients find the server."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if config.ssl_certfile else 'http'}://{shown}:{port}"


@contextlib.contextmanager
def _bound(host: str, port: int, uds: str | None = None) -> Iterator[socket.socket]:
    """A socket with its address, which nobody can connect to yet."""
    try:
        if uds is not None:
            listener, address = socket.socket(socket.AF_UNIX), uds
        else:
            [(family, kind, proto, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[assignment]
            listener = socket.socket(family, kind, proto)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InvalidParameter(f"cannot listen on {uds or f'{host}:{port}'}: {error.strerror or error}") from error
    with listener:
        yield listener


@contextlib.contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    try:
        file = open(path, "a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise InvalidParameter(f"the log file {path} cannot be opened: {error.strerror}") from error
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # the disk is full: what could not be written is lost and counted
            file.close()
