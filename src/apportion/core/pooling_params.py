"""What a caller may ask of the hidden states of a prompt. Names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass

from apportion.core.errors import InvalidParameter

POOLING_TYPES = ("last", "mean", "cls")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """One vector for a prompt, from its hidden states after the last norm. pooling_type: "last" (that of the last token), "mean" (of all),
    "cls" (that of the first). normalize: to length 1. truncate_prompt_tokens: keep the last so many tokens (-1: as many as
    max_model_len allows).

    Errors: InvalidParameter.
    """

    pooling_type: str = "last"
    normalize: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.pooling_type not in POOLING_TYPES:
            raise InvalidParameter(f"unknown pooling_type {self.pooling_type!r}; known: {', '.join(POOLING_TYPES)}")
        if not isinstance(self.normalize, bool):
            raise InvalidParameter(f"normalize must be True or False, got {self.normalize!r}")
        limit = self.truncate_prompt_tokens
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or (limit < 1 and limit != -1)):
            raise InvalidParameter(f"truncate_prompt_tokens must be a positive integer or -1, got {limit!r}")

    @property
    def needs_every_token(self) -> bool:
        """Whether hidden states that a prefix hit leaves out would be missed."""
        return self.pooling_type != "last"
