"""One life of the engine process as the API process holds it: the process, its socket, and its report of why it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TextIO

import msgspec
import zmq
import zmq.asyncio

from apportion.core.config import EngineConfig
from apportion.serving.config import ServeConfig
from apportion.serving.messages import Command, EngineSetup, Event, LastWords

STOP_TIMEOUT_S = 6.0
PROGRAM = "apportion.serving.engine_process"


class EngineLink:
    """Starts the process at once, so that it loads while this one still imports. log: where its standard error goes."""

    def __init__(self, config: ServeConfig, engine: EngineConfig, log: TextIO | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="apportion-"))  # a socket's path must be short
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        address = f"ipc://{self.folder}/engine.sock"
        self._socket.bind(address)
        tokenizers = dict.fromkeys(config.models, config.tokenizer) if config.tokenizer else {}
        setup = EngineSetup(
            address, str(self.folder), engine, config.preload, tokenizers, config.model_memory, log_format=config.log_format
        )
        self._report, report = os.pipe()
        os.set_blocking(self._report, False)
        command = [sys.executable, "-m", PROGRAM, str(report)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, pass_fds=(report,), process_group=0)
        os.close(report)
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(msgspec.json.encode(setup) + b"\n")
        stdin.flush()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Event).decode

    @property
    def pid(self) -> int:
        return self.process.pid

    def attach(self) -> asyncio.Future[int]:
        """A future of the exit status, on the running loop."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[int] = loop.create_future()

        def tell(status: int) -> None:
            if not ended.done():
                ended.set_result(status)

        def wait() -> None:
            status = self.process.wait()
            with contextlib.suppress(RuntimeError):  # the loop has gone first
                loop.call_soon_threadsafe(tell, status)

        threading.Thread(target=wait, name="engine-wait", daemon=True).start()
        return ended

    async def send(self, command: Command) -> None:
        await self._socket.send(self._encode(command))

    async def receive(self) -> Event:
        event: Event = self._decode(await self._socket.recv())
        return event

    def last_words(self) -> LastWords:
        """Why the process ended: its own report, or what ended it from outside."""
        report = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._report, 65536):
                report += piece
        if report.startswith(b"{"):
            with contextlib.suppress(msgspec.DecodeError):
                return msgspec.json.decode(report, type=LastWords)
        status = self.process.returncode
        lines = [line.strip() for line in report.decode(errors="replace").splitlines() if line.strip()]
        if status is not None and status < 0:
            return LastWords("Killed", f"the engine process was ended by {signal.Signals(-status).name}", lines[-6:])
        return LastWords("Exited", f"the engine process ended with status {status}", lines[-6:])

    def stop(self, *, at_once: bool = False) -> None:
        """End the process, kindly unless at_once, and clear up. Idempotent."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(0 if at_once else STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group of its own: its workers go too
            self.process.wait()
        if not self._socket.closed:
            self._socket.close()
            self._context.term()
            os.close(self._report)
        shutil.rmtree(self.folder, ignore_errors=True)
