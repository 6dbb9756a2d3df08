"""The models of the engine process: reads what they are, loads and unloads them, makes room for one by unloading those long unused.

It tells of every change; who listens is not known here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from apportion.core.errors import ApportionError, OutOfMemory
from apportion.core.model_spec import ModelSpec
from apportion.engine.build import Progress, add_model, build_engine, plan_engine, read_model
from apportion.engine.engine import Engine
from apportion.engine.input_processor import InputProcessor
from apportion.engine.memory_plan import model_memory
from apportion.engine.output_processor import OutputProcessor
from apportion.models.checkpoint import read_generation_defaults, resolve_folder
from apportion.platforms.platform import select_platform
from apportion.processor.tokenizer import Tokenizer
from apportion.serving.messages import EngineSetup, ModelInfo, ModelState
from apportion.serving.model_store import ModelStore
from apportion.serving.structured.compiler import GrammarCompiler


class ModelLoader:
    """store: every model and its state. inputs: of loaded models, by name. outputs: makes text of their tokens.

    tell: called with every model's state whenever one has changed. progress: while weights load."""

    def __init__(
        self,
        setup: EngineSetup,
        compiler: GrammarCompiler,
        tell: Callable[[list[ModelInfo]], None],
        progress: Progress,
    ) -> None:
        self._setup, self._compiler, self._tell = setup, compiler, tell
        self._tokenizers: dict[str, Tokenizer] = {}
        self.inputs: dict[str, InputProcessor] = {}
        self.outputs = OutputProcessor(self._tokenizers)
        self.store = ModelStore(setup.config.models, setup.model_memory)
        self.engine = self._start(progress)

    def _start(self, progress: Progress) -> Engine:
        """Load what shall be there from the beginning. Every known model that is a local folder counts in how KV memory is cut."""
        config = self._setup.config
        preload = self._within_budget(self._setup.preload)
        first = plan_engine(replace(config, models=tuple(m for m in config.models if m.name in preload)))
        later = [read_model(m) for m in config.models if m.name not in preload and Path(m.model).expanduser().is_dir()]
        for model in first.config.models:
            self._describe(model.name, model.model, first.specs[model.name], state=ModelState.LOADING)
            self._read_tokenizer(model.name, model.model)
        engine = self.engine = build_engine(first, self.outputs, progress, later)
        self._config = replace(config, cache=replace(config.cache, kv_cache_memory=first.memory.kv_cache))
        for model in first.config.models:
            self._loaded(model.name, first.specs[model.name])
        for model, spec in later:
            self._describe(model.name, model.model, spec)
        self._tell(self.store.infos)
        _keep_out_of_collections()
        return engine

    def _within_budget(self, names: Sequence[str]) -> list[str]:
        """The first ones that fit into the budget together; at least one, which then says what it lacks."""
        kept: list[str] = []
        for name in names:
            model, spec = read_model(self.store.get(name).config)
            self._describe(name, model.model, spec)
            total = sum(self.store.get(n).info.weight_bytes for n in [*kept, name])
            if kept and self.store.budget_bytes is not None and total > self.store.budget_bytes:
                break
            kept.append(name)
        return kept

    def load(self, name: str) -> None:
        """Make room and load; the loop stands still meanwhile, heartbeats go on."""
        stored = self.store.get(name)
        self._set(name, state=ModelState.LOADING)
        self._tell(self.store.infos)
        try:
            model, spec = read_model(stored.config)
            self._describe(name, model.model, spec, state=ModelState.LOADING)
            free = select_platform(self._config.device).free_memory()
            for victim in self.store.victims(self.store.get(name).info.weight_bytes, free, self._is_idle):
                self.unload(victim)
            self._read_tokenizer(name, model.model)
            add_model(self.engine, self._config, model, spec)
            self._loaded(name, spec)
            _keep_out_of_collections()
        except ApportionError as error:
            state = ModelState.UNLOADED if isinstance(error, OutOfMemory) else ModelState.FAILED  # memory may be there next time
            self._set(name, state=state, error=str(error))
            raise
        finally:
            self._tell(self.store.infos)

    def unload(self, name: str) -> None:
        if self.store.get(name).is_loaded:
            self.engine.remove_model(name)
            del self.inputs[name], self._tokenizers[name]
            self._compiler.remove_model(name)
            self._set(name, state=ModelState.UNLOADED)
            self._tell(self.store.infos)
            _keep_out_of_collections()

    def _is_idle(self, name: str) -> bool:
        return not self.engine.models[name].scheduler.has_unfinished

    def _loaded(self, name: str, spec: ModelSpec) -> None:
        max_model_len = self.engine.models[name].scheduler.max_model_len
        self.inputs[name] = InputProcessor(name, spec, max_model_len, self._tokenizers[name], self._setup.config.seed)
        self._compiler.add_model(name, self._tokenizers[name], spec.vocab, sorted(self.inputs[name].eos_token_ids))
        self.store.touch(name)
        self._set(name, state=ModelState.LOADED, max_model_len=max_model_len, error="")

    def _describe(self, name: str, folder: str, spec: ModelSpec, state: ModelState = ModelState.UNLOADED) -> None:
        need = model_memory(replace(self.store.get(name).config, model=folder), spec, self._setup.config, 2**20)
        self._set(
            name,
            state=state,
            folder=folder,
            vocab_size=spec.vocab,
            hidden_size=spec.hidden,
            weight_bytes=need.weights + need.activations + need.rotary,
            max_model_len=need.max_model_len,
            default_sampling=read_generation_defaults(Path(folder)),
        )

    def _read_tokenizer(self, name: str, folder: str) -> None:
        """Here for detokenizing; the API process gets a folder that it can read without transformers."""
        given = self._setup.tokenizers.get(name)
        source = Path(folder) if given is None else Path(given) if Path(given).is_file() else resolve_folder(given)
        self._tokenizers[name] = tokenizer = Tokenizer.from_folder(source)
        if not source.is_file() and not (source / "tokenizer.json").is_file():
            source = Path(self._setup.folder) / "tokenizers" / name.replace("/", "--")
            tokenizer.save(source)
        self._set(name, tokenizer_folder=str(source))

    def _set(self, name: str, **changes: Any) -> None:
        stored = self.store.get(name)
        stored.info = msgspec.structs.replace(stored.info, **changes)


def _keep_out_of_collections() -> None:
    """What is loaded stays: a full collection would walk it again and again, and stop a step for 0.1 s each time. What an unloaded model
    left behind goes first."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
