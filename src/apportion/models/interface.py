"""What a model is to the runner: token ids and a context in, hidden states and logits out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from apportion.attention.backend import AttentionMetadata
from apportion.core.model_spec import ModelSpec


@dataclass(slots=True)
class ForwardContext:
    """Passed down, never global. positions int32 [T]; metadata: one per layer group, in the order of the model's kv groups."""

    positions_T: Tensor
    metadata: tuple[AttentionMetadata, ...]


class CausalLM(Protocol):
    spec: ModelSpec

    def forward(self, token_ids_T: Tensor, context: ForwardContext) -> Tensor:
        """token_ids int32 [T] -> hidden states [T, M], after the last norm."""

    def compute_logits(self, hidden_RM: Tensor) -> Tensor:
        """Rows chosen by the runner -> float32 logits [R, V]; under tensor parallelism gathered over the vocabulary."""
