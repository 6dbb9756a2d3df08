"""The forward pass of a step: metadata, model, hidden states. Short steps come again and again: their operator calls are recorded.

A replayed step makes the very calls of the recorded one, so its bits are those of any other; only Python stays away, which took a
tenth of a decode step of a small model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apportion.attention.backend import AttentionBackend, AttentionMetadata, ForwardContext
from apportion.engine.input_batch import StepInputs
from apportion.kernels.ops import Ops, Recording
from apportion.models.interface import CausalLM

logger = logging.getLogger(__name__)

MAX_RECORDED_TOKENS = 64  # a longer step has Python's millisecond to spare


@dataclass(frozen=True, slots=True)
class _RecordedPass:
    """version: of the activations that it reads and writes. handles: of the metadata, one per layer group."""

    calls: Recording
    version: int
    token_ids_T: Tensor
    positions_T: Tensor
    hidden_TM: Tensor
    handles: list[Any]


class ForwardPass:
    """backends: one per layer group, in the order of the model's kv groups."""

    def __init__(self, model: CausalLM, backends: tuple[AttentionBackend, ...], ops: Ops) -> None:
        self._model, self._backends, self._ops = model, backends, ops
        self._recorded: dict[int, _RecordedPass] = {}  # by number of tokens
        self.obstacle = ""  # why steps of this model are not recorded
        if model.site.group.size > 1:
            self.obstacle = "ranks exchange results"
        elif ops.recording() is None:
            self.obstacle = f"{ops.name} kernels cannot be recorded"

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Hidden states [T, M], valid until the next step."""
        num_tokens = len(inputs.token_ids_T)
        if self.obstacle or num_tokens > MAX_RECORDED_TOKENS:
            return self._model.forward(inputs.token_ids_T, ForwardContext(inputs.positions_T, self._plan(inputs)))
        found = self._recorded.get(num_tokens)
        if found is None or found.version != self._model.site.activations.version:
            return self._record(inputs)
        found.token_ids_T.copy_(inputs.token_ids_T)
        found.positions_T.copy_(inputs.positions_T)
        self._plan(inputs, found.handles)
        found.calls.replay()
        return found.hidden_TM

    def _record(self, inputs: StepInputs) -> Tensor:
        """A step as any other, its calls kept: unless one was torch's own, or a buffer moved meanwhile."""
        calls, activations = self._ops.recording(), self._model.site.activations
        assert calls is not None  # or there were an obstacle
        token_ids_T, version = inputs.token_ids_T.clone(), activations.version
        context = ForwardContext(inputs.positions_T.clone(), self._plan(inputs))
        with calls, _TorchCalls() as torch_calls:
            hidden_TM = self._model.forward(token_ids_T, context)
        if activations.version != version:
            return hidden_TM  # buffers grew on the way: the next such step meets them where they are
        if torch_calls.names:
            self.obstacle = f"the model calls {', '.join(sorted(torch_calls.names))} of torch"
            logger.info("steps are not recorded: %s", self.obstacle)
            return hidden_TM
        handles = [metadata.handle for metadata in context.metadata]
        self._recorded[len(token_ids_T)] = _RecordedPass(calls, version, token_ids_T, context.positions_T, hidden_TM, handles)
        return hidden_TM

    def _plan(self, inputs: StepInputs, handles: list[Any] | None = None) -> tuple[AttentionMetadata, ...]:
        """The batch as each layer group sees it. handles: of an earlier step, to be filled anew."""
        starts, lens = torch.from_numpy(inputs.query_start_loc), torch.from_numpy(inputs.seq_lens)
        num_requests, num_tokens = len(inputs.rows), len(inputs.token_ids_T)
        handles = handles or [None] * len(self._backends)
        return tuple(
            backend.plan(AttentionMetadata(num_requests, num_tokens, starts, lens, table, handle))
            for backend, table, handle in zip(self._backends, inputs.block_tables, handles, strict=True)
        )


class _TorchCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices what a recording would miss: every operator of torch but those that merely look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first call loads torch's compiler to be told not to look here: a second of the first token's time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))
