"""Runs requests through an engine that is made as a test says, and gives back what each request got."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from apportion.core.config import CacheConfig, EngineConfig, LaneConfig, ModelConfig, ParallelConfig, SchedulerConfig
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.engine.engine import Engine
from apportion.engine.executor.factory import ExecutorFactory
from apportion.kvcache.arena import Arena, choose_slab_bytes
from apportion.models.checkpoint import read_spec

NAME = "model"
PREFILL, DECODE = frozenset({"prefill"}), frozenset({"decode"})


@dataclass(frozen=True)
class Result:
    """token_ids and, where asked for, the log-probability of each; compared bit by bit."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How an engine is made. kv_blocks: KV memory in blocks of every layer group. slab_factor: slabs so many times the smallest."""

    model: Path
    dtype: str = "float32"
    load_format: str = "auto"
    kernels: str = "auto"
    kv_blocks: int = 512
    slab_factor: int = 1
    num_threads: int | None = 1
    budget: int = 2048
    max_num_seqs: int = 256
    prefix_caching: bool = False
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    lanes: tuple[LaneConfig, ...] = (LaneConfig(),)

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            models=(ModelConfig(model=str(self.model), name=NAME, dtype=self.dtype, load_format=self.load_format),),
            cache=CacheConfig(enable_prefix_caching=self.prefix_caching, kv_cache_dtype=self.kv_cache_dtype),
            scheduler=SchedulerConfig(max_num_batched_tokens=self.budget, max_num_seqs=self.max_num_seqs),
            parallel=ParallelConfig(tensor_parallel_size=self.tensor_parallel_size),
            lanes=self.lanes,
            kernels=self.kernels,
            num_threads=self.num_threads,
        )


@dataclass
class Running:
    """An engine with its model loaded. preemptions and prefix hits tell a test that what it is about did happen."""

    engine: Engine
    groups: tuple[KVGroupSpec, ...]
    eos_token_ids: frozenset[int]
    num_requests: int = 0
    on_step: list[Callable[[Engine], None]] = field(default_factory=list)

    def generate(self, prompts: Iterable[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[Result]:
        """All prompts at once, to the end."""
        return self.finish(self.add(prompts, params))

    def add(
        self,
        prompts: Iterable[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        model: str = NAME,
        eos_token_ids: frozenset[int] | None = None,
    ) -> list[Request]:
        """eos_token_ids: those of another model than the first."""
        eos_token_ids = self.eos_token_ids if eos_token_ids is None else eos_token_ids
        prompts = list(prompts)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = []
        for prompt, one in zip(prompts, each, strict=True):
            self.num_requests += 1
            requests.append(Request(f"request-{self.num_requests}", model, list(prompt), one, eos_token_ids))
            self.engine.add_request(requests[-1])
        return requests

    def finish(self, requests: Iterable[Request]) -> list[Result]:
        """Step until nothing is left to do."""
        found: dict[str, list[float]] = {}
        while self.engine.has_unfinished:
            for update in self.engine.step(timeout_s=5.0):
                found.setdefault(update.request.request_id, []).extend(entry.logprobs[0] for entry in update.logprobs)
            for hook in self.on_step:
                hook(self.engine)
        self.engine.check_integrity()
        return [Result(tuple(r.output_token_ids), tuple(found[r.request_id]), r.error) for r in requests]

    @property
    def metrics(self):
        return self.engine.metrics()[NAME]


@contextmanager
def running(setup: Setup):
    """An engine made by `setup`, shut down at the end."""
    config = setup.config
    spec = read_spec(setup.model)
    kv_dtype = spec.dtype if setup.dtype == "auto" else setup.dtype
    if setup.kv_cache_dtype != "auto":
        kv_dtype = setup.kv_cache_dtype
    groups = spec.kv_groups(kv_dtype, config.cache.block_size, setup.tensor_parallel_size)
    num_bytes = setup.kv_blocks * sum(group.block_bytes for group in groups)
    arena = Arena(num_bytes, setup.slab_factor * choose_slab_bytes([group.block_bytes for group in groups], num_bytes))
    executors = ExecutorFactory(config, arena.num_bytes)
    engine = Engine(config.lanes, executors, arena, config.scheduler, config.cache)
    try:
        engine.add_model(config.models[0], spec, groups)
        yield Running(engine, groups, frozenset(spec.eos_token_ids))
    finally:
        engine.shutdown()
        executors.close()


def generate(setup: Setup, prompts: Iterable[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[Result]:
    with running(setup) as run:
        return run.generate(prompts, params)
