"""Models of the engine process, loaded and unloaded in this one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import closing

import pytest

from apportion.assets import DEFAULT_MODEL
from apportion.core.config import CacheConfig, EngineConfig, ModelConfig
from apportion.serving.messages import EngineSetup
from apportion.serving.model_loader import ModelLoader
from apportion.serving.structured.compiler import GrammarCompiler


@pytest.fixture
def loader() -> Iterator[ModelLoader]:
    models = tuple(ModelConfig(model=str(DEFAULT_MODEL), name=name, max_model_len=128) for name in ("first", "second"))
    setup = EngineSetup("", "", EngineConfig(models=models, cache=CacheConfig(kv_cache_memory=64 << 20)), preload=("first",))
    with closing(GrammarCompiler()) as compiler:
        found = ModelLoader(setup, compiler, lambda infos: None, lambda done, total: None)
        yield found
        found.engine.shutdown()
    gc.unfreeze()


def test_collections_do_not_walk_what_is_loaded(loader: ModelLoader) -> None:
    first = gc.get_freeze_count()
    assert first > 10_000  # the process's modules alone are more
    loader.load("second")
    assert gc.get_freeze_count() > first
    assert len(gc.get_objects()) < 0.1 * first  # what a full collection still sees


def test_what_an_unloaded_model_leaves_behind_is_collected(loader: ModelLoader) -> None:
    loader.load("second")
    scheduler = loader.engine.models["second"].scheduler
    scheduler.itself = scheduler  # a cycle: counting references does not free it
    gone = weakref.ref(scheduler)
    del scheduler
    loader.unload("second")
    assert gone() is None
    assert loader.engine.models.keys() == {"first"}
