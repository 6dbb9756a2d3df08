"""What a layer that owns weights says to the loader: how many bytes, where they are, which checkpoint tensors fill them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from apportion.parallel.groups import ParallelGroup

CHUNK_BYTES = 32 << 20  # a larger tensor is packed in pieces of about this size


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of one axis: [start, start + count) of `total`."""

    total: int
    start: int
    count: int

    @classmethod
    def whole(cls, total: int) -> Shard:
        return cls(total, 0, total)

    @classmethod
    def even(cls, total: int, group: ParallelGroup) -> Shard:
        start, stop = total * group.rank // group.size, total * (group.rank + 1) // group.size
        return cls(total, start, stop - start)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A part of one checkpoint tensor and where it goes.

    shape: of the whole tensor as the file must have it. index: the part that `load` takes, one slice per axis. init: what random weights
    put there. Several sources may name one tensor. Every rank names every tensor: where it takes no part, `index` has an empty slice and
    `load` is not called.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    load: Callable[[Tensor], None]
    init: str = "normal"  # or "ones"


class WeightLayer(Protocol):
    """A leaf of the module tree that owns weights. `name` is its own, as in the checkpoint."""

    name: str

    @property
    def nbytes(self) -> int: ...

    def bind(self, buffer: Tensor) -> None:
        """Use `buffer` (uint8 [nbytes], 256-byte aligned), whose content may already be the packed weights."""

    def sources(self, present: Collection[str]) -> Iterator[TensorSource]:
        """The checkpoint tensors that fill this layer. `present`: the names the checkpoint has, for layers that know several layouts."""

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest: two processes whose descriptions agree can share the bytes."""


def row_chunks(count: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, number) of rows in pieces of about CHUNK_BYTES, multiples of 32 rows but the last; one empty piece for no rows."""
    step = max(32, CHUNK_BYTES // max(row_bytes, 1) // 32 * 32)
    for first in range(0, max(count, 1), step):
        yield first, min(step, count - first)
