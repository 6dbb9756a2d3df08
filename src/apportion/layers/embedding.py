"""The vocabulary at both ends of a decoder: one kind of matrix, read by rows or multiplied, cut over ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from apportion.kernels.ops import LinearSpec
from apportion.layers.site import Site
from apportion.layers.weights import Shard, Source, matrix_sources


class VocabularyMatrix(nn.Module):
    """[V, M] in the packed panels of a linear. `embed` reads rows, `logits` multiplies; a tied model has one for both.

    Under tensor parallelism each rank holds `width` rows, the last ranks' padded with rows that are cut off again.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        group, vocab = site.group, site.spec.vocab
        self.name = site.name
        self.record = site.records.of(site.name, "Linear" if site.name.endswith("lm_head") else "Embedding")
        self.hidden = site.spec.hidden
        self.vocab = vocab
        self.width = vocab if group.size == 1 else -(-vocab // (group.size * 32)) * 32
        start = min(group.rank * self.width, vocab)
        self.shard = Shard(vocab, start, min(self.width, vocab - start))
        self.op = site.ops.linear(LinearSpec(self.width, self.hidden, self.record.scheme))
        self._group = group
        self._activations = site.activations

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """int32 [T] -> float32 [T, M] in the slot "residual"."""
        if self._group.size == 1:
            return self.op.rows(token_ids_T, self._activations.take("residual", len(token_ids_T), self.hidden))
        local = token_ids_T - self.shard.start
        elsewhere = (local < 0) | (local >= self.shard.count)
        rows = self.op.rows(local.masked_fill_(elsewhere, 0))
        return self._group.all_reduce(rows.masked_fill_(elsewhere[:, None], 0.0))

    def logits(self, hidden_RM: Tensor) -> Tensor:
        """[R, M] -> float32 [R, V], gathered over ranks; valid until the next call."""
        logits = self.op(hidden_RM, self._activations.take("logits", hidden_RM.shape[0], self.width))
        return logits if self._group.size == 1 else self._group.all_gather_last_dim(logits)[:, : self.vocab]

    @property
    def nbytes(self) -> int:
        return self.op.nbytes

    def bind(self, buffer: Tensor) -> None:
        self.op.bind(buffer)

    def sources(self, present: Collection[str]) -> Iterator[Source]:
        yield from matrix_sources(self.name, self.record, self.shard, Shard.whole(self.hidden), self.op.load_rows, present)

    def describe(self) -> dict[str, Any]:
        return asdict(self.op.spec)
