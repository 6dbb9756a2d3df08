"""The flat keywords that users write (LLM's arguments, the command line's flags), sorted into the frozen tree of `core.config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from apportion.core.config import CacheConfig, EngineConfig, LaneConfig, ModelConfig, ParallelConfig, SchedulerConfig
from apportion.core.errors import InvalidParameter

# keyword -> the part of EngineConfig that it belongs to
PARTS = {
    ModelConfig: ("revision", "dtype", "max_model_len", "quantization", "softmax_table", "load_format", "seed"),
    CacheConfig: ("block_size", "kv_cache_dtype", "kv_cache_memory", "enable_prefix_caching"),
    SchedulerConfig: (
        "max_num_seqs", "max_num_batched_tokens", "scheduling_policy", "enable_chunked_prefill", "long_prefill_token_threshold",
    ),
    ParallelConfig: ("tensor_parallel_size",),
    EngineConfig: ("device", "kernels", "num_threads", "lanes", "seed"),
}  # fmt: skip
KEYWORDS = frozenset(name for names in PARTS.values() for name in names)
_FIELDS = {"scheduling_policy": "policy"}  # where the field's name is another


def resolve_keywords(models: Sequence[ModelConfig], **keywords: Any) -> EngineConfig:
    """`models` and the engine that runs them; what the keywords say of models holds for each. Errors: InvalidParameter naming a
    keyword that does not exist."""
    for name in keywords.keys() - KEYWORDS:
        close = get_close_matches(name, KEYWORDS, 1)
        raise InvalidParameter(
            f"unknown parameter {name!r}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(KEYWORDS))}")
        )
    parts = {kind: {_FIELDS.get(name, name): keywords[name] for name in names if name in keywords} for kind, names in PARTS.items()}
    if keywords.get("tensor_parallel_size", 1) != 1:
        parts[EngineConfig].setdefault("lanes", (LaneConfig(executor="multiproc"),))
    return EngineConfig(
        models=tuple(replace(model, **parts[ModelConfig]) for model in models),
        cache=CacheConfig(**parts[CacheConfig]),
        scheduler=SchedulerConfig(**parts[SchedulerConfig]),
        parallel=ParallelConfig(**parts[ParallelConfig]),
        **parts[EngineConfig],
    )
