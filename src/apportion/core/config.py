"""Configuration as a frozen tree, resolved once. Each room takes its own small part; nothing is written afterwards.

Names and defaults are vLLM's where they mean the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from apportion.core.errors import InvalidParameter

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEVICES = ("auto", "cpu", "cuda", "rocm")
PHASES = frozenset({"prefill", "decode"})
_DTYPE_NAMES = {"auto": "auto", "float": "float32", "half": "float16"} | {name: name for name in DTYPES}


def _positive(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InvalidParameter(f"{name} must be a positive integer, got {value!r}")


def _switch(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise InvalidParameter(f"{name} must be True or False, got {value!r}")


def _natural(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidParameter(f"{name} must be an integer of at least 0, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What to load. name: how requests call it. dtype: 'auto' takes the checkpoint's (float32 stays float32)."""

    model: str
    name: str = ""
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    quantization: str | None = None
    softmax_table: str | None = None  # unified maxima of attention (core/softmax_table), a JSON file
    load_format: str = "auto"  # or "dummy": random weights of the config's shapes, for benchmarks
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPE_NAMES:
            raise InvalidParameter(f"unknown dtype {self.dtype!r}; known: auto, {', '.join(DTYPES)}")
        object.__setattr__(self, "dtype", _DTYPE_NAMES[self.dtype])
        if not self.name:
            object.__setattr__(self, "name", self.model)
        if self.load_format not in ("auto", "dummy"):
            raise InvalidParameter(f"unknown load_format {self.load_format!r}; known: auto, dummy")
        _positive("max_model_len", self.max_model_len)
        _natural("seed", self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """kv_cache_memory: bytes for all KV of the engine, None sizes it from free memory. kv_cache_dtype: 'auto' is what the
    checkpoint was made for, or else the model's dtype; others are in core/kv_spec.KV_FORMATS."""

    block_size: int = 32
    kv_cache_dtype: str = "auto"
    kv_cache_memory: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.block_size not in (32, 64, 128):
            raise InvalidParameter(f"block_size must be 32, 64 or 128, got {self.block_size}")
        _positive("kv_cache_memory", self.kv_cache_memory)
        _switch("enable_prefix_caching", self.enable_prefix_caching)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """policy: 'fcfs' or 'priority'. max_num_batched_tokens: the token budget of one step."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # cap on one request's tokens in a step; 0: none

    def __post_init__(self) -> None:
        _positive("max_num_seqs", self.max_num_seqs)
        _positive("max_num_batched_tokens", self.max_num_batched_tokens)
        _natural("long_prefill_token_threshold", self.long_prefill_token_threshold)
        _switch("enable_chunked_prefill", self.enable_chunked_prefill)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneConfig:
    """One executor and the work it takes. phases: any of 'prefill', 'decode'. models: names, empty for all.

    executor: 'uniproc' (in this process), 'multiproc' (worker processes), or 'ray'. num_threads: its compute share on a CPU.
    depth: tickets in flight; None: as many as keep the device busy, two on a GPU, else one.
    """

    name: str = "main"
    phases: frozenset[str] = PHASES
    models: tuple[str, ...] = ()
    executor: str = "uniproc"
    num_threads: int | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        _positive("depth", self.depth)
        _positive("num_threads", self.num_threads)
        if not self.phases or self.phases - PHASES:
            raise InvalidParameter(f"lane {self.name!r}: phases must be some of {', '.join(sorted(PHASES))}, got {sorted(self.phases)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        _positive("tensor_parallel_size", self.tensor_parallel_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The whole tree. device: 'auto' (a GPU if one is usable), 'cpu', 'cuda' or 'rocm'. num_threads None: the cores this process may use.

    kernels: 'auto' takes the fastest that the machine can run; 'reference' or 'cpu' pins one set and fails where it cannot run.
    """

    models: tuple[ModelConfig, ...]
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lanes: tuple[LaneConfig, ...] = (LaneConfig(),)
    device: str = "auto"
    kernels: str = "auto"
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _positive("num_threads", self.num_threads)
        if self.device not in DEVICES:
            raise InvalidParameter(f"unknown device {self.device!r}; known: {', '.join(DEVICES)}")
        if len({m.name for m in self.models}) != len(self.models):
            raise InvalidParameter("two models have the same name; give each its own")
        _natural("seed", self.seed)
        if not isinstance(self.lanes, tuple | list) or any(not isinstance(lane, LaneConfig) for lane in self.lanes):
            raise InvalidParameter(f"lanes must be a list of LaneConfig, got {self.lanes!r}")
        if not self.lanes:
            raise InvalidParameter("an engine needs at least one lane")
        if len({lane.name for lane in self.lanes}) != len(self.lanes):
            raise InvalidParameter("two lanes have the same name; give each its own")

    @property
    def resolved_num_threads(self) -> int:
        return self.num_threads or len(os.sched_getaffinity(0))
