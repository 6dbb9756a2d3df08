"""Where a layer is built: for which model, with whose operators, on which rank, in which number formats, under which name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from apportion.core.errors import InternalError
from apportion.core.model_spec import ModelSpec
from apportion.kernels.ops import Ops
from apportion.parallel.groups import ParallelGroup
from apportion.platforms.arena import Arena
from apportion.quant.scheme import LinearRecords

HUGE_BUFFER_BYTES = 1 << 21
MAX_VIEWS = 4096  # remembered (slot, T) pairs; steps come in few sizes


class Activations:
    """The buffers of one step, float32, reused by every layer and every step.

    A slot's content lives until the slot is taken again, so a model instance runs one step at a time. version: changes when a slot moves.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.version = 0
        self._storage: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int], Tensor] = {}

    def take(self, slot: str, num_tokens: int, width: int) -> Tensor:
        """An uninitialized [num_tokens, width]. A slot has one width."""
        view = self._views.get((slot, num_tokens))
        return view if view is not None else self._make(slot, num_tokens, width)

    def _make(self, slot: str, num_tokens: int, width: int) -> Tensor:
        storage = self._storage.get(slot)
        if storage is not None and storage.shape[1] != width:
            raise InternalError(f"activation slot {slot!r} is {storage.shape[1]} wide and was asked for {width}")
        if storage is None or len(storage) < num_tokens:
            rows = 1 << max(num_tokens - 1, 0).bit_length()  # pages that are never touched cost nothing
            self.version += 1
            storage = self._storage[slot] = _allocate(rows, width, self._device)
            self._views = {key: view for key, view in self._views.items() if key[0] != slot}  # they keep the old storage alive
        if len(self._views) >= MAX_VIEWS:
            self._views.clear()
        view = self._views[slot, num_tokens] = storage[:num_tokens]
        return view

    def held(self) -> list[Tensor]:
        """The storage of every slot as it is now: whoever remembers addresses keeps it alive."""
        return list(self._storage.values())


def _allocate(rows: int, width: int, device: torch.device) -> Tensor:
    """Large buffers from huge pages: a linear writes each of their rows in another page, and misses in the page tables are dear."""
    nbytes = rows * width * 4
    if nbytes < HUGE_BUFFER_BYTES or device.type != "cpu":
        return torch.empty(rows, width, device=device)
    return Arena.create(nbytes, shared=False).tensor.view(torch.float32).view(rows, width)


@dataclass(frozen=True, slots=True)
class Site:
    """`site / "q_proj"` is the place of a part; names are those of the checkpoint."""

    spec: ModelSpec
    ops: Ops
    group: ParallelGroup
    records: LinearRecords
    activations: Activations = field(default_factory=Activations)
    name: str = ""

    def __truediv__(self, part: str) -> Site:
        return replace(self, name=f"{self.name}.{part}" if self.name else part)
