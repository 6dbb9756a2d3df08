"""Graphs of decode steps: what a GPU does for R requests with one token each, captured once for each padded R and replayed.

A replay reads tokens, positions and attention metadata from fixed memory, and leaves hidden states and logits there. Rows beyond R belong
to no request: they write no KV and read none. Knows batches and backends; must not know which device captures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.attention.backend import AttentionBackend, AttentionMetadata, ForwardContext
from apportion.engine.input_batch import StepInputs
from apportion.models.interface import CausalLM
from apportion.platforms.platform import Captured

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(slots=True)
class _Graph:
    captured: Captured
    held: list[Tensor]  # activations that it writes, kept alive


class DecodeGraphs:
    """capture: platforms/platform.Platform's."""

    def __init__(self, capture: Callable[[Callable[[], Any]], Captured], model: CausalLM, backends: Sequence[AttentionBackend]) -> None:
        device = model.site.ops.device
        self._capture, self._model, self._backends = capture, model, backends
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._tokens, self._positions = (torch.zeros(SIZES[-1], dtype=torch.int32, device=device) for _ in range(2))

    def run(self, inputs: StepInputs) -> tuple[Tensor, Tensor] | None:
        """(hidden states [R, M], logits [R, V]), valid until the next step; None for a step that is not R requests with a token each."""
        num_requests = len(inputs.rows)
        if num_requests != len(inputs.token_ids_T) or num_requests > SIZES[-1]:
            return None
        size = next(s for s in SIZES if s >= num_requests)
        self._tokens[:num_requests].copy_(inputs.token_ids_T)
        self._positions[:num_requests].copy_(inputs.positions_T)
        metadata = self._plan(inputs, size)
        key = (size, *(m.block_table.shape[1] for m in metadata), *(backend.generation for backend in self._backends))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._make(size, ForwardContext(self._positions[:size], metadata), key)
        graph.captured.replay()
        hidden_RM, logits_RV = graph.captured.outputs
        return hidden_RM[:num_requests], logits_RV[:num_requests]

    def _plan(self, inputs: StepInputs, size: int) -> tuple[AttentionMetadata, ...]:
        """The step padded to `size` requests, its block tables to a power of two of blocks: metadata then lies where it lay before."""
        missing = size - len(inputs.rows)
        starts = torch.from_numpy(np.pad(inputs.query_start_loc, (0, missing), mode="edge"))
        lens = torch.from_numpy(np.pad(inputs.seq_lens, (0, missing)))
        found = []
        for backend, table in zip(self._backends, inputs.block_tables, strict=True):
            width = 1 << (table.shape[1] - 1).bit_length()
            padded = torch.nn.functional.pad(table, (0, width - table.shape[1], 0, missing), value=-1)
            found.append(backend.plan(AttentionMetadata(size, size, starts, lens, padded)))
        return tuple(found)

    def _make(self, size: int, context: ForwardContext, key: tuple[Any, ...]) -> _Graph:
        stale = [known for known in self._graphs if known[-len(self._backends) :] != key[-len(self._backends) :]]
        for known in stale:  # the metadata has moved: they read memory that is no longer theirs
            del self._graphs[known]

        def step() -> tuple[Tensor, Tensor]:
            hidden_TM = self._model.forward(self._tokens[:size], context)
            return hidden_TM, self._model.compute_logits(hidden_TM)

        captured = self._capture(step)
        return _Graph(captured, self._model.site.activations.held())
