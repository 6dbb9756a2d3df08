"""OpenAI's embeddings."""

from __future__ import annotations

import sys
from array import array
from base64 import b64encode
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from apportion.core.errors import InvalidParameter
from apportion.core.pooling_params import PoolingParams
from apportion.serving.protocol.openai import Int, TokenIds
from apportion.serving.protocol.shapes import Strict


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: Annotated[str | None, Field(description="name of a model of /v1/models; the first when absent")] = None
    input: Annotated[str | list[str] | TokenIds | list[TokenIds], Field(description="text, token ids, or several of either")]
    encoding_format: Annotated[Literal["float", "base64"], Field(description="base64: of little-endian float32")] = "float"
    dimensions: Annotated[Int | None, Field(description="the model's own number; no other is offered")] = None
    user: Annotated[str | None, Field(description="written to the request's log line")] = None
    pooling_type: Annotated[Literal["last", "mean", "cls"], Field(description="whose hidden state: last token, mean, first")] = "last"
    normalize: Annotated[bool, Field(description="to length 1")] = True
    add_special_tokens: Annotated[bool, Field(description="let the tokenizer add what it adds")] = True
    truncate_prompt_tokens: Annotated[Int | None, Field(description="keep the last N tokens of an input; -1: as many as fit")] = None
    priority: Annotated[Int, Field(description="smaller runs earlier, with --scheduling-policy priority")] = 0
    cache_salt: Annotated[str | None, Field(description="inputs with another salt share no prefix cache")] = None

    def inputs(self) -> list[str] | list[TokenIds]:
        """One entry an input. Errors: InvalidParameter."""
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise InvalidParameter("input is an empty list; give at least one")
        if isinstance(self.input[0], int):
            return [self.input]
        return self.input

    def pooling_params(self) -> PoolingParams:
        return PoolingParams(pooling_type=self.pooling_type, normalize=self.normalize, truncate_prompt_tokens=self.truncate_prompt_tokens)

    def check_dimensions(self, size: int) -> None:
        """Errors: InvalidParameter unless the vector has as many as were asked for."""
        if self.dimensions is not None and self.dimensions != size:
            raise InvalidParameter(f"dimensions is {self.dimensions} and the model's vectors have {size}; a part of one means nothing")


def answer(model: str, vectors: Sequence[list[float]], num_tokens: int, *, base64: bool) -> dict[str, Any]:
    """OpenAI's list of embeddings."""
    data = [{"object": "embedding", "index": i, "embedding": _base64(v) if base64 else v} for i, v in enumerate(vectors)]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}


def _base64(vector: list[float]) -> str:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats.tobytes()).decode()
