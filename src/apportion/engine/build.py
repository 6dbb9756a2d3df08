"""From a configuration to a running engine: read specs, plan memory, map the KV arena, start lanes, load models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from apportion.core.config import EngineConfig, ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import ModelSpec
from apportion.engine.engine import Engine, OutputProcessor
from apportion.engine.executor.factory import ExecutorFactory
from apportion.engine.memory_plan import MemoryPlan, kv_groups, plan_memory
from apportion.kernels.dispatch import choose
from apportion.kvcache.arena import Arena, choose_slab_bytes
from apportion.models.checkpoint import read_spec, resolve_folder
from apportion.platforms.platform import select_platform

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """An engine that is decided and not yet built. config: every choice made, models with folders and lengths. specs, by model name."""

    config: EngineConfig
    specs: dict[str, ModelSpec]
    memory: MemoryPlan


def plan_engine(config: EngineConfig) -> Blueprint:
    """Read what the models are and plan memory; loads nothing.

    Errors: CheckpointError, Unsupported (architecture, device, kernels), OutOfMemory (saying what would fit), InvalidParameter.
    """
    if not config.models:
        raise InvalidParameter("an engine needs at least one model")
    found = [_read(model) for model in config.models]
    platform = select_platform(config.device)
    choose(platform.name, config.kernels)  # refuse unknown kernels here, before a worker dies of them
    memory = plan_memory(found, config, platform.free_memory())
    models = []
    for (model, spec), need in zip(found, memory.models, strict=True):
        if model.max_model_len is None and need.max_model_len < spec.max_position:
            logger.warning(
                "max_model_len of %s is %d, not %d: that is what memory holds", model.name, need.max_model_len, spec.max_position
            )
        models.append(replace(model, max_model_len=need.max_model_len))
    return Blueprint(replace(config, models=tuple(models)), {model.name: spec for model, spec in found}, memory)


def build_engine(blueprint: Blueprint, output_processor: OutputProcessor | None = None, progress: Progress | None = None) -> Engine:
    """Start the lanes and load the models. progress: called with (bytes loaded, bytes in all) of each model."""
    config = blueprint.config
    groups = {model.name: kv_groups(model, blueprint.specs[model.name], config) for model in config.models}
    kv_bytes = blueprint.memory.kv_cache // config.parallel.tensor_parallel_size
    arena = Arena(kv_bytes, choose_slab_bytes([g.block_bytes for group in groups.values() for g in group], kv_bytes))
    factory = ExecutorFactory(config, arena.num_bytes, progress)
    engine = Engine(config.lanes, factory, arena, config.scheduler, config.cache, output_processor=output_processor)
    try:
        for model in config.models:
            engine.add_model(model, blueprint.specs[model.name], groups[model.name], version=f"{model.model}@{model.revision}")
    except BaseException:
        engine.shutdown()
        raise
    return engine


def _read(model: ModelConfig) -> tuple[ModelConfig, ModelSpec]:
    if model.quantization is not None:
        raise InvalidParameter(f"quantization {model.quantization!r} is not known to this build")
    if model.revision is not None and Path(model.model).expanduser().is_dir():
        raise InvalidParameter(f"revision {model.revision!r} chooses among those of a hub model, and {model.model} is a folder")
    folder = resolve_folder(model.model, model.revision)
    return replace(model, model=str(folder)), read_spec(Path(folder))
