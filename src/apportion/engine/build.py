"""From a configuration to a running engine: read specs, plan memory, map the KV arena, start lanes, load models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apportion.core.config import EngineConfig, ModelConfig
from apportion.core.errors import InvalidParameter, OutOfMemory
from apportion.core.model_spec import ModelSpec
from apportion.engine.engine import Engine, OutputProcessor
from apportion.engine.executor.factory import ExecutorFactory, deal_threads
from apportion.engine.memory_plan import MemoryPlan, format_bytes, kv_groups, model_memory, plan_memory
from apportion.kernels.dispatch import choose
from apportion.kvcache.arena import Arena, choose_slab_bytes
from apportion.models.checkpoint import read_spec, resolve_folder
from apportion.models.loader import with_formats
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
    found = [read_model(model) for model in config.models]
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
    shares = deal_threads(config, platform)
    lanes = tuple(replace(lane, num_threads=shares[lane.name].num_threads, depth=lane.depth or platform.depth) for lane in config.lanes)
    return Blueprint(replace(config, models=tuple(models), lanes=lanes), {model.name: spec for model, spec in found}, memory)


def build_engine(
    blueprint: Blueprint,
    output_processor: OutputProcessor | None = None,
    progress: Progress | None = None,
    later: Sequence[tuple[ModelConfig, ModelSpec]] = (),
) -> Engine:
    """Start the lanes and load the models. progress: called with (bytes loaded, bytes in all) of each model. later: models that may be
    added while the engine runs; the KV memory is cut so that they fit too."""
    config = blueprint.config
    groups = {model.name: kv_groups(model, blueprint.specs[model.name], config) for model in config.models}
    kv_bytes = blueprint.memory.kv_cache // config.parallel.tensor_parallel_size
    all_groups = [*groups.values(), *(kv_groups(model, spec, config) for model, spec in later)]
    arena = Arena(kv_bytes, choose_slab_bytes([g.block_bytes for group in all_groups for g in group], kv_bytes))
    factory = ExecutorFactory(config, arena.num_bytes, progress)
    engine = Engine(config.lanes, factory, arena, config.scheduler, config.cache, output_processor=output_processor)
    try:
        for model in config.models:
            engine.add_model(model, blueprint.specs[model.name], groups[model.name], version=f"{model.model}@{model.revision}")
    except BaseException:
        engine.shutdown()
        raise
    return engine


def add_model(engine: Engine, config: EngineConfig, model: ModelConfig, spec: ModelSpec) -> None:
    """Load one more model, as `read_model` returned it, into a running engine.

    Errors: OutOfMemory when its weights do not fit into what is free, or its sequences into the KV memory; whatever loading raises.
    """
    need = model_memory(model, spec, config, engine.arena.slab_bytes)
    taken, free = need.weights + need.activations + need.rotary, select_platform(config.device).free_memory()
    if taken > free:
        raise OutOfMemory(f"model {model.name!r} takes {format_bytes(taken)} and {format_bytes(free)} are free; unload another model first")
    engine.add_model(model, spec, kv_groups(model, spec, config), version=f"{model.model}@{model.revision}")


def read_model(model: ModelConfig) -> tuple[ModelConfig, ModelSpec]:
    """The model with its folder, and its spec. Errors: CheckpointError, Unsupported, InvalidParameter."""
    if model.revision is not None and Path(model.model).expanduser().is_dir():
        raise InvalidParameter(f"revision {model.revision!r} chooses among those of a hub model, and {model.model} is a folder")
    folder = resolve_folder(model.model, model.revision)
    found = replace(model, model=str(folder))
    return found, with_formats(found, read_spec(Path(folder)))
