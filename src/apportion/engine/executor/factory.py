"""Starts the executors of one engine: deals the cores out to lanes and ranks, and gives all of them the same KV memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apportion.core.config import EngineConfig, LaneConfig
from apportion.core.errors import InvalidParameter
from apportion.core.registry import Registry
from apportion.engine.executor.worker_client import WorkerClient
from apportion.engine.worker import WorkerConfig
from apportion.platforms.arena import Arena
from apportion.platforms.platform import ComputeShare, Platform, deal, select_platform

EXECUTORS: Registry[Callable[[list[WorkerConfig], list[Arena]], WorkerClient]] = Registry(
    "executor",
    {
        "uniproc": "apportion.engine.executor.uniproc:uniproc",
        "multiproc": "apportion.engine.executor.multiproc:multiproc",
    },
)


class ExecutorFactory:
    """Call it with a lane's configuration to start, or start again, that lane's executor.

    kv_bytes: of one rank. progress: called with (bytes loaded, bytes in all) while a model loads.
    Errors: InvalidParameter where lanes and ranks need more threads than there are cores, OutOfMemory.
    """

    def __init__(self, config: EngineConfig, kv_bytes: int, progress: Callable[[int, int], None] | None = None) -> None:
        self._config = config
        self._progress = progress
        self._platform = select_platform(config.device)
        self._shares = deal_threads(config, self._platform)
        self._shared = any(lane.executor != "uniproc" for lane in config.lanes)  # does another process map our bytes?
        self.kv_arenas = [self._platform.create_arena(kv_bytes, self._shared) for _ in range(config.parallel.tensor_parallel_size)]

    def __call__(self, lane: LaneConfig) -> WorkerClient:
        size = self._config.parallel.tensor_parallel_size
        share = self._shares[lane.name]
        if share.num_threads < size:
            raise InvalidParameter(f"lane {lane.name!r} has {share.num_threads} threads for {size} ranks; give every rank one")
        shares = deal(share.cores, [(share.num_threads + rank) // size for rank in range(size)], share.pinned)
        name, device, kernels = lane.name, self._platform.name, self._config.kernels
        workers = [WorkerConfig(name, device, kernels, share, self._shared, rank, size) for rank, share in enumerate(shares)]
        client = EXECUTORS.get(lane.executor)(workers, self.kv_arenas)
        client.on_progress = self._progress
        return client

    def close(self) -> None:
        """Drop the KV memory; executors that still run keep their own hold on it."""
        for arena in self.kv_arenas:
            arena.close()


def deal_threads(config: EngineConfig, platform: Platform) -> dict[str, ComputeShare]:
    """A share of the cores for every lane, by name. Lanes that name no number split what the others leave."""
    total = config.num_threads or platform.num_cores
    open_lanes = [lane for lane in config.lanes if lane.num_threads is None]
    left = total - sum(lane.num_threads or 0 for lane in config.lanes)
    if left < len(open_lanes):
        raise InvalidParameter(f"{len(config.lanes)} lanes need more than the {total} threads at hand; every lane takes at least one")
    counts = _split(left, len(open_lanes))
    wanted: Sequence[int] = [lane.num_threads or counts.pop() for lane in config.lanes]
    return dict(zip((lane.name for lane in config.lanes), platform.compute_shares(wanted), strict=True))


def _split(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)][::-1] if parts else []
