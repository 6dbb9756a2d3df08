"""Workers in processes of their own, one per rank: started fresh (no fork of a threaded process), tied to this one by two descriptors.

The socket carries messages; when a worker ends in any way its end closes, and that is the news of its death. The lifeline is a pipe that
nobody writes to; when this process ends in any way the worker's read returns, and it ends too. A worker sits in a session of its own, so
that Ctrl-C reaches this process alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from apportion.engine.executor.worker_client import Reply, WorkerClient
from apportion.engine.worker import WorkerConfig
from apportion.platforms.arena import Arena
from apportion.platforms.channel import Channel

STOP_TIMEOUT_S = 5.0
REAP_TIMEOUT_S = 0.5


def multiproc(configs: list[WorkerConfig], kv_arenas: list[Arena]) -> WorkerClient:
    """An executor of one process per rank; returns while they start."""
    replies: SimpleQueue[Reply] = SimpleQueue()
    folder = tempfile.mkdtemp(prefix="apportion-") if len(configs) > 1 else ""
    configs = [replace(config, store_path=f"{folder}/store") if folder else config for config in configs]
    links = [ProcessLink(config, arena, replies) for config, arena in zip(configs, kv_arenas, strict=True)]
    client = WorkerClient(configs[0].name, list(links), replies)
    if folder:
        weakref.finalize(client, shutil.rmtree, folder, ignore_errors=True)
    return client


class ProcessLink:
    def __init__(self, config: WorkerConfig, kv_arena: Arena, replies: SimpleQueue[Reply]) -> None:
        ours, theirs = socket.socketpair()
        lifeline, held = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "apportion.engine.worker", str(theirs.fileno()), str(lifeline)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=(theirs.fileno(), lifeline),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(lifeline)
        self.pid = process.pid
        self._channel = Channel(ours)
        self.send((config, kv_arena))
        reader = threading.Thread(target=_read, args=(self._channel, process, config.rank, replies), daemon=True)
        reader.start()
        self.close = weakref.finalize(self, _stop, self._channel, process, held, reader)

    def send(self, message: tuple[Any, ...]) -> None:
        try:
            self._channel.send(message)
        except EOFError:
            return  # the reader reports how the worker ended


def _read(channel: Channel, process: subprocess.Popen[bytes], rank: int, replies: SimpleQueue[Reply]) -> None:
    """Hand on a worker's replies until it ends."""
    while True:
        try:
            kind, value = channel.receive()
        except (EOFError, OSError):
            break
        replies.put((rank, kind, value))
    replies.put((rank, "gone", f"worker process {process.pid} {_ending(process)}"))


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(REAP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _stop(channel: Channel, process: subprocess.Popen[bytes], held: int, reader: threading.Thread) -> None:
    try:
        channel.send(None)
    except EOFError:
        pass  # it is gone already
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    os.close(held)
    reader.join(REAP_TIMEOUT_S * 2)
    channel.close()
