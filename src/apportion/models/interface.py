"""What a model is to the runner: token ids and a context in, hidden states and logits out."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from apportion.attention.backend import ForwardContext
from apportion.layers.site import Site

__all__ = ["CausalLM", "ForwardContext"]


class CausalLM(Protocol):
    """A module tree made from a Site. One instance runs one step at a time: its results live in buffers that the next step reuses.

    aliases: (pattern, replacement) of checkpoint names that are spelt otherwise there; the first pattern found counts.
    """

    site: Site
    aliases: tuple[tuple[str, str], ...]

    def forward(self, token_ids_T: Tensor, context: ForwardContext) -> Tensor:
        """token_ids int32 [T] -> hidden states [T, M], after the last norm."""

    def compute_logits(self, hidden_RM: Tensor) -> Tensor:
        """Rows chosen by the runner -> float32 logits [R, V]; under tensor parallelism gathered over the vocabulary."""
