"""The engine process: owns the engine and its loop, loads models, tells the API process what is new.

It ends when its standard input does (the API process has gone, or wants it to go). An exception that nobody handles is the end of the
process: its type, message and last frames go to the report pipe, and the API process starts another one.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil
import zmq

from apportion.core.errors import ApportionError, InvalidParameter
from apportion.core.grammar import Grammar
from apportion.core.request import Request, RequestUpdate
from apportion.engine.engine import EngineModel
from apportion.engine.input_processor import InputProcessor
from apportion.serving.logs import set_up_logs
from apportion.serving.messages import (
    Abort,
    Accepted,
    Answer,
    CacheStatus,
    CheckIntegrity,
    Command,
    Deltas,
    EngineSetup,
    Finished,
    Generate,
    LaneStatus,
    LastWords,
    LoadModel,
    Models,
    Refused,
    Status,
    UnloadModel,
)  # fmt: skip
from apportion.serving.model_loader import ModelLoader
from apportion.serving.structured.admission import GrammarAdmission

logger = logging.getLogger(__name__)

POLL_S = 0.05  # how long a step is waited for before new commands are looked at
LAST_FRAMES = 6
GRACE_S = 5.0  # to end by itself once the API process has gone


@dataclass(slots=True, eq=False)
class _Open:
    """A request that has sequences running. num_left: those not yet told to be finished."""

    requests: list[Request]
    num_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_left = len(self.requests)


class EngineProcess:
    """socket: connected to the API process. stopping: set by another thread when the process shall end."""

    def __init__(self, setup: EngineSetup, socket: zmq.Socket[bytes], stopping: threading.Event) -> None:
        self._setup, self._socket, self._stopping = setup, socket, stopping
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Command).decode
        self._open: dict[str, _Open] = {}
        self._grammars = GrammarAdmission()
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._grammars.wakeup, zmq.POLLIN)
        self._whole: set[str] = set()  # requests that are told when they are finished
        self._last_heartbeat = 0.0
        self._last_step = time.monotonic()
        self._process = psutil.Process()
        self._handlers: dict[type, Callable[[Any], None]] = {
            Generate: self._generate, Abort: self._abort, LoadModel: self._load_model, UnloadModel: self._unload_model,
            CheckIntegrity: self._check_integrity,
        }  # fmt: skip
        self._is_loading = True
        self._models = ModelLoader(
            setup, self._grammars.compiler, lambda infos: self._send(Models(infos)), lambda done, total: self._beat()
        )
        self._is_loading = False
        self._engine = self._models.engine

    def run(self) -> None:
        """Until told to stop: take commands, step, tell. What a step brought is told while the next one runs."""
        updates: list[RequestUpdate] = []
        while not self._stopping.is_set():
            self._take_commands(wait=not self._engine.has_unfinished and not updates)
            updates += self._engine.step(0.0)
            self._publish(updates)
            self._beat()
            updates = self._engine.step(POLL_S)
        self._engine.shutdown()
        self._grammars.close()

    # Commands

    def _take_commands(self, wait: bool) -> None:
        if wait:
            self._beat(force=True)
            self._poller.poll(int(self._setup.heartbeat_s * 1000))
        for waiting, grammar in self._grammars.take_ready():
            self._generate(waiting, grammar)
        while True:
            try:
                command = self._decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._handlers[type(command)](command)

    def _generate(self, command: Generate, grammar: Callable[[], Grammar] | ApportionError | None = None) -> None:
        """Queue a request; one that wants a grammar comes here again with what came of compiling it."""
        try:
            if isinstance(grammar, ApportionError):
                raise grammar
            if not self._models.store.get(command.model).is_loaded:
                self._models.load(command.model)
            if command.params.structured_outputs is not None and grammar is None:
                return self._grammars.ask(command)
            self._add(command, grammar)
        except ApportionError as error:
            self._send(Refused(command.request_id, type(error).__name__, str(error)))
        else:
            self._send(Accepted(command.request_id))

    def _add(self, command: Generate, start_grammar: Callable[[], Grammar] | None) -> None:
        """Queue every sequence of a request or, when one cannot be served, none."""
        if command.priority and self._setup.config.scheduler.policy != "priority":
            raise InvalidParameter('priority needs --scheduling-policy "priority"')
        self._models.store.touch(command.model)
        requests = _requests(command, self._models.inputs[command.model], start_grammar)
        for request in requests:
            request.tenant = command.cache_salt
            request.times.arrival_s = command.arrival_s
        self._models.outputs.add(command.request_id, command.prompt, requests)
        added: list[Request] = []
        try:
            for request in requests:
                self._engine.add_request(request)
                added.append(request)
        except ApportionError:
            self._forget(requests, added)
            raise
        self._open[command.request_id] = _Open(requests)
        if not command.stream:
            self._whole.add(command.request_id)

    def _abort(self, command: Abort) -> None:
        for request_id in command.request_ids:
            request = self._open.pop(request_id, None)
            self._whole.discard(request_id)
            self._grammars.drop(request_id)
            if request is not None:
                self._forget(request.requests, request.requests)

    def _forget(self, requests: list[Request], added: list[Request]) -> None:
        self._models.outputs.forget(requests)
        for request in added:
            self._engine.abort(request.request_id)

    def _load_model(self, command: LoadModel) -> None:
        self._answer(command.call_id, lambda: None if self._models.store.get(command.name).is_loaded else self._models.load(command.name))

    def _unload_model(self, command: UnloadModel) -> None:
        self._answer(command.call_id, lambda: self._models.unload(command.name))

    def _check_integrity(self, command: CheckIntegrity) -> None:
        self._answer(command.call_id, self._engine.check_integrity)

    def _answer(self, call_id: int, call: Callable[[], object]) -> None:
        try:
            call()
        except ApportionError as error:
            self._send(Answer(call_id, type(error).__name__, str(error)))
        else:
            self._send(Answer(call_id))

    # News

    def _publish(self, updates: list[RequestUpdate]) -> None:
        if not updates:
            return
        deltas = self._models.outputs.deltas(updates, self._whole)
        finished = [end for delta in deltas if delta.finish_reason and (end := self._ended(delta.request_id))]
        if deltas:
            self._send(Deltas(deltas, finished))
        updates.clear()

    def _ended(self, request_id: str) -> Finished | None:
        open_request = self._open[request_id]
        open_request.num_left -= 1
        if open_request.num_left:
            return None
        del self._open[request_id]
        self._whole.discard(request_id)
        return Finished.of(request_id, open_request.requests)

    def _beat(self, force: bool = False) -> None:
        """Send the heartbeat when it is due."""
        now = time.monotonic()
        if not force and now - self._last_heartbeat < self._setup.heartbeat_s:
            return
        self._last_heartbeat = now
        if self._is_loading:  # the first models
            self._send(Status(busy=False, since_step_s=0.0))
            return
        engine = self._engine
        steps = list(engine.ended_steps)
        engine.ended_steps.clear()
        busy = engine.has_unfinished
        if steps or not busy:
            self._last_step = now
        self._send(
            Status(
                busy=busy,
                since_step_s=now - self._last_step,
                metrics=engine.metrics(),
                lanes=[LaneStatus.of(lane) for lane in engine.lanes],
                caches={name: self._cache_status(model) for name, model in engine.models.items()},
                kv_bytes={name: model.scheduler.kv.quota.held_bytes for name, model in engine.models.items()},
                kv_total_bytes=engine.arena.num_bytes,
                steps=steps,
                rss_bytes=self._process.memory_info().rss,
            )
        )

    def _cache_status(self, model: EngineModel) -> CacheStatus:
        cache, block_bytes = self._setup.config.cache, sum(group.block_bytes for group in model.kv_groups)
        num_blocks = self._engine.arena.num_bytes // block_bytes
        return CacheStatus(cache.block_size, cache.kv_cache_dtype, cache.enable_prefix_caching, num_blocks)

    def _send(self, event: object) -> None:
        self._socket.send(self._encode(event), copy=True)


def _requests(command: Generate, inputs: InputProcessor, start_grammar: Callable[[], Grammar] | None) -> list[Request]:
    request_id, prompt, priority = command.request_id, command.prompt_token_ids, command.priority
    if command.pooling_params is not None:
        return [inputs.make_pooling_request(request_id, prompt, command.pooling_params, priority=priority)]
    return inputs.make_requests(request_id, prompt, command.params, priority=priority, start_grammar=start_grammar)


def _watch_parent(stopping: threading.Event) -> None:
    """Standard input ends with the API process, however that ends."""
    while os.read(0, 4096):
        pass
    stopping.set()
    time.sleep(GRACE_S)
    os._exit(1)  # the main thread hangs in a step


def main() -> int:
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    faulthandler.enable(report, all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the API process decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    setup = msgspec.json.decode(_read_line(), type=EngineSetup)
    set_up_logs("engine", setup.log_format)
    stopping = threading.Event()
    threading.Thread(target=_watch_parent, args=(stopping,), name="parent-watch", daemon=True).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.linger = 1000
    socket.connect(setup.address)
    try:
        EngineProcess(setup, socket, stopping).run()
    except BaseException as error:
        frames = [f"{f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(error.__traceback__)[-LAST_FRAMES:]]
        os.write(report, msgspec.json.encode(LastWords(type(error).__name__, str(error), frames)))
        logger.error("the engine process ends: %s: %s", type(error).__name__, error, exc_info=not isinstance(error, ApportionError))
        return 1
    finally:
        socket.close()
        context.term()
        shutil.rmtree(setup.folder, ignore_errors=True)  # the API process may have been killed
    return 0


def _read_line() -> bytes:
    """One line of standard input, and not a byte more."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise EOFError("standard input ended before the setup came")
        line += byte
    return bytes(line)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
