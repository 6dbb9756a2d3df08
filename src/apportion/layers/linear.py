"""Linears of a decoder. Which rows or columns of a checkpoint matrix a rank holds is decided here, so that models never mention ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor, nn

from apportion.core.config import DTYPES
from apportion.kernels.ops import LinearSpec
from apportion.layers.site import Site
from apportion.layers.weights import Shard, TensorSource, row_chunks


class Linear(nn.Module):
    """y = x W^T + b on this rank's part of W. x [T, C] -> y [T, N], float32, in the activation slot `slot`: valid until it is taken again.

    projections: checkpoint names and row shards that follow one another in N. columns: the shard of C. With `reduce` the result is summed
    over ranks, and the first rank alone adds the bias. Layers call `forward` directly, past hooks: who wants to see x wraps `op`.
    """

    def __init__(
        self, site: Site, projections: Sequence[tuple[str, Shard]], columns: Shard, slot: str, bias: bool = False, reduce: bool = False
    ) -> None:
        super().__init__()
        self.name = site.name
        self.projections = tuple(projections)
        self.columns = columns
        self.bias = bias
        self.record = site.records.of(*(name for name, _ in self.projections))
        self.width = sum(rows.count for _, rows in self.projections)
        adds_bias = bias and not (reduce and site.group.rank)
        self.op = site.ops.linear(LinearSpec(self.width, columns.count, self.record.dtype, adds_bias))
        self._slot = slot
        self._activations = site.activations
        self._reduce = site.group.all_reduce if reduce and site.group.size > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x, self._activations.take(self._slot, x.shape[0], self.width))
        return y if self._reduce is None else self._reduce(y)

    @property
    def nbytes(self) -> int:
        return self.op.nbytes

    def bind(self, buffer: Tensor) -> None:
        self.op.bind(buffer)

    def sources(self, present: Collection[str]) -> Iterator[TensorSource]:
        row = 0
        columns = slice(self.columns.start, self.columns.start + self.columns.count)
        for name, rows in self.projections:
            shape = (rows.total, self.columns.total)
            for first, number in row_chunks(rows.count, self.columns.total * DTYPES[self.record.dtype]):
                start = rows.start + first
                load = partial(self.op.load_rows, row=row + first)
                yield TensorSource(f"{name}.weight", shape, (slice(start, start + number), columns), load)
            if self.bias:
                index = (slice(rows.start, rows.start + rows.count if self.op.spec.bias else rows.start),)
                yield TensorSource(f"{name}.bias", (rows.total,), index, partial(self.op.load_bias, row=row))
            row += rows.count

    def describe(self) -> dict[str, Any]:
        return asdict(self.op.spec) | asdict(self.record)


class HeadLinear(nn.Module):
    """y_h = x_h W_h^T for every head of this rank: x [T, H, C], y [T, H, N], both with any strides between rows and heads.

    The checkpoint tensor `site` holds `height` rows per head; W_h [N, C] is rows `part` of them, or their transpose. A linear of its own
    for each head keeps the promise that a row's bits depend on that row alone.
    """

    def __init__(self, site: Site, heads: Shard, height: int, columns: int, part: slice, transposed: bool = False) -> None:
        super().__init__()
        self.name = f"{site.name}.{part.start}"
        self.heads, self.height, self.columns, self.part, self.transposed = heads, height, columns, part, transposed
        self.source = site.name
        self.record = site.records.of(site.name)
        rows = part.stop - part.start
        shape = (columns, rows) if transposed else (rows, columns)
        self.ops = [site.ops.linear(LinearSpec(*shape, self.record.dtype)) for _ in range(heads.count)]
        self._stride = -(-self.ops[0].nbytes // 256) * 256

    def forward(self, x_THC: Tensor, out_THN: Tensor) -> Tensor:
        for head, op in enumerate(self.ops):
            op(x_THC[:, head], out_THN[:, head])
        return out_THN

    @property
    def nbytes(self) -> int:
        return self._stride * len(self.ops)

    def bind(self, buffer: Tensor) -> None:
        for head, op in enumerate(self.ops):
            op.bind(buffer[head * self._stride : head * self._stride + op.nbytes])

    def sources(self, present: Collection[str]) -> Iterator[TensorSource]:
        for head, op in enumerate(self.ops):
            first = (self.heads.start + head) * self.height
            index = (slice(first + self.part.start, first + self.part.stop), slice(None))
            yield TensorSource(f"{self.source}.weight", (self.heads.total * self.height, self.columns), index, partial(self._load, op))

    def _load(self, op: Any, weight: Tensor) -> None:
        op.load_rows(weight.T.contiguous() if self.transposed else weight, 0)

    def describe(self) -> dict[str, Any]:
        return asdict(self.ops[0].spec) | asdict(self.record) | {"heads": len(self.ops)}


def replicated(site: Site, out_features: int, in_features: int, slot: str, bias: bool = False) -> Linear:
    """The whole matrix on every rank."""
    return Linear(site, [(site.name, Shard.whole(out_features))], Shard.whole(in_features), slot, bias)


def column_parallel(site: Site, out_features: int, in_features: int, slot: str, bias: bool = False) -> Linear:
    """Each rank computes its share of the outputs."""
    return Linear(site, [(site.name, Shard.even(out_features, site.group))], Shard.whole(in_features), slot, bias)


def row_parallel(site: Site, out_features: int, in_features: int, slot: str, bias: bool = False) -> Linear:
    """Each rank multiplies its share of the inputs; the results are summed over ranks."""
    return Linear(site, [(site.name, Shard.whole(out_features))], Shard.even(in_features, site.group), slot, bias, reduce=True)


def qkv(site: Site, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool = False) -> Linear:
    """q_proj, k_proj and v_proj of `site` as one matrix: this rank's query heads, then its key heads, then its value heads.

    With more ranks than key-value heads, neighbouring ranks hold the same ones.
    """
    rank, size = site.group.rank, site.group.size
    kept = max(1, num_kv_heads // size)
    first = rank * kept if num_kv_heads >= size else rank * num_kv_heads // size
    queries = Shard.even(num_heads * head_dim, site.group)
    keys = Shard(num_kv_heads * head_dim, first * head_dim, kept * head_dim)
    projections = [((site / part).name, shard) for part, shard in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))]
    return Linear(site / "qkv_proj", projections, Shard.whole(hidden), "qkv", bias)


def gate_up(site: Site, hidden: int, ffn: int, bias: bool = False, slot: str = "gate_up") -> Linear:
    """gate_proj and up_proj of `site` as one matrix, gates first."""
    shard = Shard.even(ffn, site.group)
    projections = [((site / part).name, shard) for part in ("gate_proj", "up_proj")]
    return Linear(site / "gate_up_proj", projections, Shard.whole(hidden), slot, bias)
