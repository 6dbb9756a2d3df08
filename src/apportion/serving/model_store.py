"""Which models the server knows, which are loaded, and who makes room for whom. Plain bookkeeping: loading itself is the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidRequest, OutOfMemory
from apportion.serving.messages import ModelInfo, ModelState


@dataclass(slots=True, eq=False)
class StoredModel:
    """config: as it was named. info: what clients are told. last_used: reading of the clock."""

    config: ModelConfig
    info: ModelInfo
    last_used: float = field(default_factory=time.monotonic)

    @property
    def is_loaded(self) -> bool:
        return self.info.state is ModelState.LOADED


class ModelStore:
    """budget_bytes: what the weights of loaded models may take together; None for no limit of its own."""

    def __init__(
        self, configs: Iterable[ModelConfig], budget_bytes: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget_bytes = budget_bytes
        self._clock = clock
        self._models = {c.name: StoredModel(c, ModelInfo(c.name, c.model, ModelState.UNLOADED), clock()) for c in configs}

    def get(self, name: str) -> StoredModel:
        """Errors: InvalidRequest for a model the server does not know."""
        if name not in self._models:
            raise InvalidRequest(f"unknown model {name!r}; known: {', '.join(self._models)}")
        return self._models[name]

    def touch(self, name: str) -> None:
        self._models[name].last_used = self._clock()

    @property
    def infos(self) -> list[ModelInfo]:
        return [model.info for model in self._models.values()]

    @property
    def loaded_bytes(self) -> int:
        return sum(model.info.weight_bytes for model in self._models.values() if model.is_loaded)

    def victims(self, num_bytes: int, free_bytes: int, is_idle: Callable[[str], bool]) -> list[str]:
        """Models to unload, least recently used first, so that `num_bytes` more fit into the budget and into `free_bytes` of memory.

        Errors: OutOfMemory when unloading every idle model would not be enough.
        """
        missing = num_bytes - free_bytes
        if self.budget_bytes is not None:
            missing = max(missing, self.loaded_bytes + num_bytes - self.budget_bytes)
        chosen: list[str] = []
        for model in sorted(self._models.values(), key=lambda m: m.last_used):
            if missing <= 0:
                break
            if model.is_loaded and is_idle(model.config.name):
                chosen.append(model.config.name)
                missing -= model.info.weight_bytes
        if missing > 0:
            busy = [m.config.name for m in self._models.values() if m.is_loaded and m.config.name not in chosen]
            held = f"; {', '.join(busy)} cannot be unloaded while requests run" if busy else ""
            raise OutOfMemory(f"the model takes {num_bytes} bytes and {missing} of them are missing{held}")
        return chosen
