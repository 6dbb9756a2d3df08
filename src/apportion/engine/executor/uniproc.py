"""A worker in this process, on a thread of its own: kernels release the GIL, so two such lanes overlap, and the caller is never pinned."""

from __future__ import annotations

import os
import threading
import weakref
from queue import SimpleQueue
from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.engine.executor.worker_client import Reply, WorkerClient
from apportion.engine.worker import WorkerConfig, serve
from apportion.platforms.arena import Arena

JOIN_TIMEOUT_S = 30.0


def uniproc(configs: list[WorkerConfig], kv_arenas: list[Arena]) -> WorkerClient:
    """An executor of one worker thread."""
    if len(configs) != 1:
        raise InvalidParameter(f"executor 'uniproc' runs one rank, tensor_parallel_size is {len(configs)}: use executor 'multiproc'")
    replies: SimpleQueue[Reply] = SimpleQueue()
    return WorkerClient(configs[0].name, [ThreadLink(configs[0], kv_arenas[0], replies)], replies)


class ThreadLink:
    def __init__(self, config: WorkerConfig, kv_arena: Arena, replies: SimpleQueue[Reply]) -> None:
        self.pid = os.getpid()
        self._inbox: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()

        def reply(kind: str, value: Any) -> None:
            replies.put((0, kind, value))

        arguments = (config, kv_arena, self._inbox.get, reply, lambda: not self._inbox.empty())
        thread = threading.Thread(target=serve, args=arguments, name=f"worker-{config.name}", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _stop, self._inbox, thread)

    def send(self, message: tuple[Any, ...]) -> None:
        self._inbox.put(message)


def _stop(inbox: SimpleQueue[tuple[Any, ...] | None], thread: threading.Thread) -> None:
    inbox.put(None)
    thread.join(JOIN_TIMEOUT_S)
