"""Requests that wait for their grammar. The engine's thread hands them in and takes them out again; it never waits for one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future

from apportion.core.errors import ApportionError
from apportion.core.grammar import Grammar
from apportion.serving.messages import Generate
from apportion.serving.structured.compiler import CompiledGrammar, GrammarCompiler


class GrammarAdmission:
    """wakeup: a file descriptor that is readable once a request may have become ready."""

    def __init__(self) -> None:
        self.compiler = GrammarCompiler()
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK)
        self._waiting: dict[str, tuple[Generate, Future[CompiledGrammar]]] = {}

    def ask(self, command: Generate) -> None:
        """Errors: InvalidParameter."""
        if command.params.structured_outputs is not None:
            compiled = self.compiler.submit(command.model, command.params.structured_outputs)
            self._waiting[command.request_id] = (command, compiled)
            compiled.add_done_callback(lambda _: os.eventfd_write(self.wakeup, 1))

    def drop(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)

    def take_ready(self) -> list[tuple[Generate, Callable[[], Grammar] | ApportionError]]:
        """Each with what starts its grammar, or with why it cannot be had."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wakeup)
        ready: list[tuple[Generate, Callable[[], Grammar] | ApportionError]] = []
        for request_id, (command, compiled) in list(self._waiting.items()):
            if not compiled.done():
                continue
            del self._waiting[request_id]
            error = compiled.exception()
            if error is None:
                ready.append((command, compiled.result().start))
            elif isinstance(error, ApportionError):
                ready.append((command, error))
            else:
                raise error
        return ready

    def close(self) -> None:
        self.compiler.close()
        os.close(self.wakeup)
