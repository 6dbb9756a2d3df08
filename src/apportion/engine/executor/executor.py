"""The executor seam: where a step goes to be computed. It knows messages and handles; it must not know scheduling, blocks or tokens.

An executor is one lane's worth of compute: a device, or a rank group, with its share of cores. How things reach it:

KV memory   one arena of bytes per device, given to the constructor (in this process a buffer, elsewhere a handle that the worker
            maps). All executors of an engine are given the same arena; which bytes a step may touch stands in its block tables.
weights     `load_model(config, spec, kv_groups)` reads the checkpoint, packs it into an arena and returns a `WeightsHandle`. The
            engine hands that handle to the `load_model` of every further lane, which maps the same bytes and packs nothing. The
            bytes live as long as the engine holds the handle, so they outlive an executor that dies, and a restart loads nothing.
steps       `submit` never blocks on compute when fewer than the lane's `depth` tickets are out. Steps of one executor run in the
            order of submission, whatever their models. `finished_ids` are forgotten first, then `kv_ops` run, then the batch.
restart     the engine makes a new executor by the factory it was given, and loads its models with the handles it kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from apportion.core.config import ModelConfig
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.model_spec import ModelSpec
from apportion.core.schedule import ModelRunnerOutput, SchedulerOutput


@dataclass(frozen=True, slots=True)
class WeightsHandle:
    """Packed weights that another executor on this machine can attach.

    arena: the platform's handle of the bytes (one per rank), opaque to the engine, picklable if the executor crosses processes.
    manifest: what lies where in it, opaque too. num_bytes: of all ranks.
    """

    model: str
    num_bytes: int
    arena: Any = None
    manifest: Any = None


class Executor(Protocol):
    """Runs steps. Every method raises `ExecutorDied`, with the child's own report as `cause`, once the executor is gone."""

    @property
    def is_alive(self) -> bool:
        """False once a worker ended; cheap, asked every engine step."""

    def load_model(
        self, config: ModelConfig, spec: ModelSpec, kv_groups: tuple[KVGroupSpec, ...], weights: WeightsHandle | None = None
    ) -> WeightsHandle:
        """Make `config.name` runnable. With `weights`, attach them instead of reading the checkpoint. Blocks until done.

        Errors: CheckpointError, OutOfMemory, Unsupported; the executor stays usable.
        """

    def unload_model(self, name: str) -> None:
        """Forget a model and its requests. Called only when none of its steps is in flight."""

    def submit(self, step: SchedulerOutput) -> int:
        """Queue a step; returns its ticket, unique in this executor and rising. Errors of one request go into
        `ModelRunnerOutput.errors`; what raises in `poll` is the end of the executor."""

    def poll(self, timeout_s: float) -> list[tuple[int, ModelRunnerOutput]]:
        """Steps that ended since the last call, in order of submission. Waits up to `timeout_s` seconds (0: not at all) for the first."""

    def shutdown(self) -> None:
        """End the workers and wait for them. Idempotent; safe after a death and in a signal handler's wake."""
