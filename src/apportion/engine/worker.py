"""One rank of one lane: a share of the device, its operators, the KV arena, and the models it runs. Serves calls and steps in order.

`python -m apportion.engine.worker SOCKET LIFELINE` is a worker process (engine/executor/multiproc starts it).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apportion.core.config import ModelConfig
from apportion.core.errors import InternalError
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.model_hash import model_hash
from apportion.core.model_spec import ModelSpec
from apportion.core.schedule import SchedulerOutput
from apportion.core.softmax_table import SoftmaxTable
from apportion.engine.executor.worker_client import refusable
from apportion.engine.model_runner import Launched, ModelRunner
from apportion.kernels.dispatch import select_ops
from apportion.kvcache.storage import KVStorage
from apportion.layers.attention import bind_paged_attention, unify_softmax
from apportion.models.loader import Progress, attach_model, load_model
from apportion.parallel.groups import connect
from apportion.platforms.arena import Arena
from apportion.platforms.channel import Channel
from apportion.platforms.platform import ComputeShare, select_platform

REPORT_FRAMES = 4
POLL_S = 0.00005  # how often a device is asked whether it has made a step, with nothing to queue meanwhile


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """name: of the lane. shared: other processes map its weights. store_path: where the ranks of a group meet."""

    name: str
    device: str
    kernels: str
    share: ComputeShare
    shared: bool = False
    rank: int = 0
    size: int = 1
    store_path: str = ""


class Worker:
    def __init__(self, config: WorkerConfig, kv_arena: Arena, progress: Progress | None = None) -> None:
        self.config = config
        self.platform = select_platform(config.device)
        self.platform.enter(config.share)
        torch.set_num_threads(1)  # kernels bring their own team
        torch.set_grad_enabled(False)
        self.ops = select_ops(self.platform, config.share, config.kernels)
        self.group = connect(config.rank, config.size, config.store_path)
        self.storage = KVStorage(kv_arena)
        self.runners: dict[str, ModelRunner] = {}
        self._progress = progress

    def load_model(
        self, config: ModelConfig, spec: ModelSpec, kv_groups: tuple[KVGroupSpec, ...], weights: tuple[Arena, dict[str, Any]] | None
    ) -> tuple[Arena, dict[str, Any]]:
        """Make a model runnable, from its checkpoint or over weights that another worker packed: (arena, manifest), given and returned."""
        if weights is None:
            create_arena = partial(self.platform.create_arena, shared=self.config.shared)
            loaded = load_model(config, spec, self.ops, self.group, progress=self._progress, create_arena=create_arena)
            loaded.arena.collapse()
        else:
            arena, manifest = weights
            loaded = attach_model(manifest, arena, self.ops, self.group)
        max_len = config.max_model_len or spec.max_position
        backends = bind_paged_attention(loaded.model, loaded.model.site, kv_groups, self.storage.tensor, max_len)
        if config.softmax_table is not None:
            table = SoftmaxTable.read(Path(config.softmax_table))
            table.check(model_hash(Path(config.model)), spec.num_layers, spec.num_heads)
            unify_softmax(backends, kv_groups, loaded.model.site, table)
        self.runners[config.name] = ModelRunner(loaded.model, backends, self.ops, self.platform)
        return loaded.arena, loaded.manifest

    def unload_model(self, name: str) -> bool:
        """True if it was loaded."""
        return self.runners.pop(name, None) is not None

    def launch(self, step: SchedulerOutput) -> Launched:
        runner = self.runners.get(step.model)
        if runner is None:
            raise InternalError(f"a step of model {step.model!r} reached a worker that has {', '.join(self.runners) or 'none'}")
        self.storage.run(step.kv_ops)
        return runner.launch(step)


def serve(
    config: WorkerConfig, kv_arena: Arena, receive: Callable[[], Any], reply: Callable[[str, Any], None], waiting: Callable[[], bool]
) -> None:
    """Make a worker and answer messages until one is None. waiting: whether `receive` has one: it is queued before a step is waited for.

    'failed': the worker cannot be made, as the error says. 'died': whatever else ends it.
    """
    try:
        worker = Worker(config, kv_arena, (lambda done, total: reply("progress", (done, total))) if config.rank == 0 else None)
    except Exception as error:
        reply(*("failed", error) if refusable(error) else ("died", report(error)))
        return
    try:
        launched: deque[Launched] = deque()
        while True:
            while launched and (launched[0].is_ready or not waiting()):
                if not launched[0].is_ready:
                    time.sleep(POLL_S)
                    continue
                output = launched.popleft().result()
                if config.rank == 0:
                    reply("output", output)
            if (message := receive()) is None:
                return
            if message[0] == "step":
                launched.append(worker.launch(message[1]))
                continue
            _, method, arguments = message
            try:
                reply("result", getattr(worker, method)(*arguments))
            except Exception as error:
                if not refusable(error):
                    raise
                reply("refused", error)
    except BaseException as error:
        reply("died", report(error))


def report(error: BaseException) -> str:
    """Type and message on the first line, then the last frames."""
    frames = "".join(traceback.format_tb(error.__traceback__)[-REPORT_FRAMES:])
    return f"{type(error).__name__}: {str(error).strip()}\n{frames}".strip()


def main(socket_fd: int, lifeline_fd: int) -> None:
    """A worker process. The first message is (config, kv_arena); it ends when told to, or as soon as its parent does."""
    threading.Thread(target=_end_with_parent, args=(lifeline_fd,), daemon=True).start()
    channel = Channel(socket.socket(fileno=socket_fd))
    try:
        config, kv_arena = channel.receive()
        serve(config, kv_arena, channel.receive, lambda kind, value: channel.send((kind, value)), channel.has_message)
    except EOFError:
        pass  # the parent is gone


def _end_with_parent(lifeline_fd: int) -> None:
    os.read(lifeline_fd, 1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
