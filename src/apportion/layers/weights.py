"""What a layer that owns weights says to the loader: how many bytes, where they are, which checkpoint tensors fill them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Any, Protocol

from torch import Tensor

from apportion.core.errors import CheckpointError
from apportion.core.number_format import Scheme
from apportion.kernels.ops import QuantizedWeight
from apportion.kernels.reference.number_formats import convert, narrow
from apportion.parallel.groups import ParallelGroup
from apportion.quant.scheme import LinearRecord

CHUNK_BYTES = 16 << 20  # a larger tensor is packed in pieces of about this size
ROUNDED_CHUNK_BYTES = 1 << 20  # where it is quantized on the way: that takes about five times as much for a moment


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

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.count)


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


@dataclass(frozen=True, slots=True)
class JointSource:
    """Checkpoint tensors of any dtypes that mean something only together: `load` takes all of them, whole, by name.

    shapes: those that each may have in the file.
    """

    shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    load: Callable[[Mapping[str, Tensor]], None]


Source = TensorSource | JointSource


class WeightLayer(Protocol):
    """A leaf of the module tree that owns weights. `name` is its own, as in the checkpoint."""

    name: str

    @property
    def nbytes(self) -> int: ...

    def bind(self, buffer: Tensor) -> None:
        """Use `buffer` (uint8 [nbytes], 256-byte aligned), whose content may already be the packed weights."""

    def sources(self, present: Collection[str]) -> Iterator[Source]:
        """The checkpoint tensors that fill this layer. `present`: the names the checkpoint has, for layers that know several layouts."""

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest: two processes whose descriptions agree can share the bytes."""


def row_chunks(count: int, row_bytes: int, multiple: int = 32, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """(first, number) of rows in pieces of about chunk_bytes, multiples of `multiple` rows but the last; one empty piece for no rows."""
    step = max(multiple, chunk_bytes // max(row_bytes, 1) // multiple * multiple)
    for first in range(0, max(count, 1), step):
        yield first, min(step, count - first)


def matrix_sources(
    name: str, record: LinearRecord, rows: Shard, columns: Shard, load: Callable[[Any, int], None], present: Collection[str]
) -> Iterator[Source]:
    """What fills this rank's part of the matrix `name` [rows.total, columns.total].

    load(weight, row): takes rows of the part from `row` on, in the format of the record's scheme.
    """
    fmt = Scheme.parse(record.scheme).weight
    shape = (rows.total, columns.total)
    shapes = record.layout.tensors(name, shape, present) if record.layout is not None else {}
    kept = fmt.is_float and f"{name}.weight" in present and any(tensor not in present for tensor in shapes)  # routers seldom are quantized
    if shapes and not kept:
        yield JointSource(shapes, partial(load_stored, name, record, rows, columns, load))
        return
    step = 32 if fmt.is_float else lcm(32, fmt.block[0] or rows.count)  # rows that share scales are quantized together
    for first, number in row_chunks(rows.count, columns.total * 4, step, CHUNK_BYTES if fmt.is_float else ROUNDED_CHUNK_BYTES):
        index = (slice(rows.start + first, rows.start + first + number), columns.slice)
        yield TensorSource(f"{name}.weight", shape, index, partial(load_floats, f"{name}.weight", record, load, first))


def load_floats(tensor: str, record: LinearRecord, load: Callable[[Any, int], None], row: int, weight: Tensor) -> None:
    """Rows of a floating-point tensor into `load`, rounded to the record's scheme. Errors: CheckpointError for numbers that cannot be."""
    weight = weight.view(weight.shape[-2:])
    scheme = Scheme.parse(record.scheme)
    if scheme.weight.is_float:
        load(weight, row)
        return
    if not weight.isfinite().all():
        raise CheckpointError(f"tensor {tensor} holds NaN or infinity and cannot be quantized")
    load(convert(weight, scheme.weight), row)


def load_stored(
    name: str, record: LinearRecord, rows: Shard, columns: Shard, load: Callable[[Any, int], None], tensors: Mapping[str, Tensor]
) -> None:
    """The tensors that a layout names into `load`: this rank's rows and columns of the matrix they mean."""
    assert record.layout is not None
    matrix = record.layout.assemble(name, (rows.total, columns.total), tensors)
    if not rows.count or not columns.count:
        return
    if isinstance(matrix, QuantizedWeight):
        matrix = narrow(matrix, rows.slice, columns.slice, name)
    else:
        matrix = matrix[rows.slice, columns.slice]
    load(convert(matrix, Scheme.parse(record.scheme).weight), 0)
