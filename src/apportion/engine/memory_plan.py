"""Before anything is loaded: what weights, KV cache and activations will take against what is free, and how large the KV cache gets.

Plain arithmetic over ModelSpec. It must not load, allocate or know a device; free bytes come in as a number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apportion.core.config import EngineConfig, ModelConfig
from apportion.core.errors import InvalidParameter, OutOfMemory
from apportion.core.kv_spec import KVGroupSpec
from apportion.core.model_spec import ModelSpec
from apportion.kvcache.arena import choose_slab_bytes

FIXED_BYTES = 350 * 2**20  # interpreter, torch and its libraries, one process
DEFAULT_SHARE = 0.5  # of what is free beside the weights, for a KV cache whose size nobody named
LARGEST_SHARE = 0.9  # of the same, when one sequence of max_model_len needs more than that
SHORTEST = 16  # tokens: a max_model_len below this is no answer


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """One model. weights: bytes over all ranks; activations, rotary (the table of max_model_len positions): over all ranks of all lanes.
    sequence_kv: bytes of KV for one sequence of max_model_len."""

    name: str
    max_model_len: int
    weights: int
    activations: int
    rotary: int
    sequence_kv: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All in bytes. kv_cache: the arena of all models together. free: what the machine (or its container) had to give."""

    models: tuple[ModelMemory, ...]
    fixed: int
    kv_cache: int
    free: int

    @property
    def weights(self) -> int:
        return sum(model.weights for model in self.models)

    @property
    def activations(self) -> int:
        return sum(model.activations for model in self.models)

    @property
    def rotary(self) -> int:
        return sum(model.rotary for model in self.models)

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.rotary + self.kv_cache + self.fixed

    def rows(self) -> list[tuple[str, int]]:
        """The plan as a table: what, and how many bytes."""
        named = len(self.models) > 1
        weights = [(f"weights of {m.name}" if named else "weights", m.weights) for m in self.models]
        parts = [*weights, ("KV cache", self.kv_cache), ("activations", self.activations), ("rotary tables", self.rotary)]
        return [*parts, ("runtime", self.fixed), ("total", self.total), ("free", self.free)]


def plan_memory(models: Sequence[tuple[ModelConfig, ModelSpec]], config: EngineConfig, free: int) -> MemoryPlan:
    """Size the KV cache and check that everything fits into `free` bytes.

    An unnamed size is half of what remains beside the weights, at least one sequence of max_model_len and at most what
    max_num_seqs of them can use. Models share the cache: each must find room for one sequence. A max_model_len that nobody
    named is lowered to what fits.
    Errors: OutOfMemory saying what would fit; InvalidParameter for a max_model_len the model is not made for.
    """
    named = config.cache.kv_cache_memory
    slab = _slab_bytes(models, config, named or free)
    needs = [model_memory(model, spec, config, slab) for model, spec in models]
    fixed = FIXED_BYTES * max(1, sum(lane.executor != "uniproc" for lane in config.lanes) * config.parallel.tensor_parallel_size)

    def taken() -> int:
        return sum(m.weights + m.activations + m.rotary for m in needs) + fixed

    def room() -> int:
        return named or int((free - taken()) * LARGEST_SHARE)

    if taken() >= free:
        weights = sum(m.weights for m in needs)
        to_run = format_bytes(taken() - weights)
        raise OutOfMemory(f"weights of {format_bytes(weights)} and {to_run} to run them do not fit: {format_bytes(free)} are free")
    if named is not None and named > free - taken():
        beside = format_bytes(free - taken())
        raise OutOfMemory(f"kv_cache_memory of {format_bytes(named)} does not fit: beside the weights {beside} are free")
    for i, (model, spec) in enumerate(models):
        wanted, had, fits = needs[i], room(), 0
        if wanted.sequence_kv <= had:
            continue
        while (longer := _largest_that_fits(model, spec, config, room(), slab)) > fits:  # a shorter rotary table leaves more room
            fits = longer
            needs[i] = model_memory(replace(model, max_model_len=fits), spec, config, slab)
        if model.max_model_len is not None or fits < SHORTEST:
            raise OutOfMemory(_too_long(wanted, had, "kv_cache_memory gives" if named else "memory leaves", fits))
    useful = sum(m.sequence_kv for m in needs) * config.scheduler.max_num_seqs
    unnamed = max(max(m.sequence_kv for m in needs), min(useful, int((free - taken()) * DEFAULT_SHARE)))
    return MemoryPlan(tuple(needs), fixed, named or unnamed, free)


def resolve_max_model_len(model: ModelConfig, spec: ModelSpec) -> int:
    """The longest sequence, prompt and output together. Errors: InvalidParameter when it is beyond the model's positions."""
    if model.max_model_len is not None and model.max_model_len > spec.max_position:
        raise InvalidParameter(
            f"max_model_len {model.max_model_len} is more than the {spec.max_position} positions that {model.name} is made for"
        )
    return model.max_model_len or spec.max_position


def sequence_kv_bytes(groups: Sequence[KVGroupSpec], num_tokens: int, max_step_tokens: int, slab_bytes: int) -> int:
    """KV bytes of one sequence in whole slabs: in a windowed group only the window, and a step's tokens beside it, stay."""
    slabs = 0
    for group in groups:
        kept = num_tokens if group.sliding_window is None else min(num_tokens, group.sliding_window + max_step_tokens)
        slabs += -(-(-(-kept // group.block_size) + 1) // (slab_bytes // group.block_bytes))
    return slabs * slab_bytes


def largest_model_len(groups: Sequence[KVGroupSpec], kv_bytes: int, max_step_tokens: int, slab_bytes: int) -> int:
    """The longest sequence whose KV fits into kv_bytes; 0 when none does."""
    return bisect_right(range(1, 2**31), kv_bytes, key=lambda n: sequence_kv_bytes(groups, n, max_step_tokens, slab_bytes))


def format_bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def model_memory(model: ModelConfig, spec: ModelSpec, config: EngineConfig, slab_bytes: int) -> ModelMemory:
    """What one model takes. Errors: InvalidParameter for a max_model_len it is not made for."""
    tp_size, scheduler = config.parallel.tensor_parallel_size, config.scheduler
    max_model_len = resolve_max_model_len(model, spec)
    step_tokens = min(scheduler.max_num_batched_tokens, max_model_len * scheduler.max_num_seqs)
    num_workers = tp_size * sum(not lane.models or model.name in lane.models for lane in config.lanes)
    return ModelMemory(
        name=model.name,
        max_model_len=max_model_len,
        weights=spec.weight_bytes(model.dtype, tp_size) * tp_size,
        activations=spec.activation_bytes(step_tokens, min(scheduler.max_num_seqs, step_tokens), tp_size) * num_workers,
        rotary=spec.rope.rotary_dim * max_model_len * 4 * num_workers,
        sequence_kv=sequence_kv_bytes(kv_groups(model, spec, config), max_model_len, step_tokens, slab_bytes) * tp_size,
    )


def kv_groups(model: ModelConfig, spec: ModelSpec, config: EngineConfig) -> tuple[KVGroupSpec, ...]:
    """A model's layer groups as one rank stores them under `config`."""
    kv_dtype = config.cache.kv_cache_dtype if config.cache.kv_cache_dtype != "auto" else spec.kv_cache_dtype or model.dtype
    return spec.kv_groups(kv_dtype, config.cache.block_size, config.parallel.tensor_parallel_size)


def _slab_bytes(models: Sequence[tuple[ModelConfig, ModelSpec]], config: EngineConfig, arena_bytes: int) -> int:
    return choose_slab_bytes([group.block_bytes for model, spec in models for group in kv_groups(model, spec, config)], arena_bytes)


def _largest_that_fits(model: ModelConfig, spec: ModelSpec, config: EngineConfig, room: int, slab_bytes: int) -> int:
    per_rank = room // config.parallel.tensor_parallel_size
    return largest_model_len(kv_groups(model, spec, config), per_rank, config.scheduler.max_num_batched_tokens, slab_bytes)


def _too_long(need: ModelMemory, room: int, source: str, fits: int) -> str:
    wanted = f"max_model_len {need.max_model_len} of {need.name} needs {format_bytes(need.sequence_kv)} of KV cache"
    what = f"{wanted} and {source} {format_bytes(room)}"
    return f"{what}: the largest that fits is {fits}" if fits else f"{what}: no length fits"
