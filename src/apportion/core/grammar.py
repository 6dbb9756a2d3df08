"""What a grammar is to the control plane: which tokens may come next in one sequence. Who compiles it, and how, is not known here."""

from __future__ import annotations

from typing import Protocol


class Grammar(Protocol):
    """The state of one sequence in its grammar. A sequence under a grammar has at most one sample in flight: the next mask depends on it.

    Every method raises InvalidRequest where the grammar asks for more than its limits allow; that ends its request alone.
    """

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""

    def accept(self, token: int) -> None:
        """`token` was sampled."""

    def mask(self, timeout_s: float) -> bytes | None:
        """A bit for each token of the vocabulary (1: may come next), the lowest of a byte first; None where it is not ready after
        `timeout_s` seconds."""
