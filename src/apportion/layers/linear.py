"""Linears of a decoder. Which rows or columns of a checkpoint matrix a rank holds is decided here, so that models never mention ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from apportion.core.number_format import Scheme
from apportion.kernels import ops as kernels
from apportion.kernels.ops import WEIGHT_DTYPES, LinearSpec
from apportion.layers.site import Site
from apportion.layers.weights import Shard, Source, TensorSource, matrix_sources
from apportion.quant.scheme import LinearRecord

FUSED = ("weight", "weight_packed", "qweight")  # a checkpoint with one of these has the projections of a linear as one


class JoinedLinear:
    """kernels/ops.Linear of linears whose outputs follow one another: projections of one input that no single product can hold."""

    rounding = None  # each has its own

    def __init__(self, parts: Sequence[kernels.Linear]) -> None:
        self.parts = parts
        self._rows = [0]
        self._starts = [0]
        for part in parts:
            self._rows.append(self._rows[-1] + part.spec.out_features)
            self._starts.append(self._starts[-1] + -(-part.nbytes // 256) * 256)
        self.nbytes = self._starts[-1]

    def bind(self, buffer: Tensor) -> None:
        for part, start in zip(self.parts, self._starts[:-1], strict=True):
            part.bind(buffer[start : start + part.nbytes])

    def load_rows(self, weight: Any, row: int) -> None:
        self._part(row).load_rows(weight, row - self._first(row))

    def load_bias(self, bias: Tensor, row: int) -> None:
        self._part(row).load_bias(bias, row - self._first(row))

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(x.shape[0], self._rows[-1], device=x.device)
        for part, (first, last) in zip(self.parts, pairwise(self._rows), strict=True):
            part(x, out[:, first:last])
        return out

    def _part(self, row: int) -> kernels.Linear:
        return self.parts[max(i for i, first in enumerate(self._rows[:-1]) if first <= row)]

    def _first(self, row: int) -> int:
        return max(first for first in self._rows[:-1] if first <= row)


class GatedLinear:
    """A gated kernels/ops.Linear over one that is not: gates and ups are stored, then combined, rounded for the linear it feeds if any."""

    def __init__(self, ungated: kernels.Linear | JoinedLinear, site: Site, slot: str) -> None:
        self.ungated = ungated
        self.nbytes, self.rounding = ungated.nbytes, ungated.rounding
        self.fed: Callable[[], kernels.Rounding | None] | None = None
        self.bind, self.load_rows, self.load_bias = ungated.bind, ungated.load_rows, ungated.load_bias
        self._silu_mul, self._activations, self._slot = site.ops.silu_mul, site.activations, f"{slot}_parts"

    def __call__(self, x: Any, out: Tensor) -> Any:
        parts = self._activations.take(self._slot, x.shape[0], 2 * out.shape[1])
        rounding = None if self.fed is None else self.fed()
        return self._silu_mul(self.ungated(x, parts), out) if rounding is None else rounding.silu_mul(self.ungated(x, parts))


class Linear(nn.Module):
    """y = x W^T + b on this rank's part of W. x [T, C] -> y [T, N], float32, in the activation slot `slot`: valid until it is taken again.

    projections: checkpoint names and row shards that follow one another in the weight. columns: the shard of C. gated: the projections
    are gates and ups, y is silu(gates) * ups. With `reduce` the result is summed over ranks, and the first rank alone adds the bias.
    Layers call `forward` directly, past hooks: who wants to see x wraps `op` before the first step. Projections whose records agree are
    one product. A checkpoint may have them fused, under the name of this linear.
    """

    def __init__(
        self,
        site: Site,
        projections: Sequence[tuple[str, Shard]],
        columns: Shard,
        slot: str,
        bias: bool = False,
        reduce: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.name = site.name
        self.projections = tuple(projections)
        self.columns = columns
        self.bias = bias
        self.records = [site.records.of(name) for name, _ in self.projections]
        self.adds_bias = bias and not (reduce and site.group.rank)
        widths = _merge([record.scheme for record in self.records], [rows.count for _, rows in self.projections])
        fused = gated and len(widths) == 1 and widths[0][0] in WEIGHT_DTYPES
        parts = [site.ops.linear(LinearSpec(width, columns.count, scheme, self.adds_bias, fused)) for scheme, width in widths]
        self.op: kernels.Linear | JoinedLinear | GatedLinear = parts[0] if len(parts) == 1 else JoinedLinear(parts)
        if gated and not fused:
            self.op = GatedLinear(self.op, site, slot)
        self.specs = [part.spec for part in parts]
        self.width = sum(rows.count for _, rows in self.projections) // (2 if gated else 1)
        self._slot = slot
        self._activations = site.activations
        self._reduce = site.group.all_reduce if reduce and site.group.size > 1 else None

    def forward(self, x: Any) -> Tensor:
        """x: rows, or RoundedRows from a norm or a gated linear that feeds this one."""
        y = self.op(x, self._activations.take(self._slot, x.shape[0], self.width))
        return y if self._reduce is None else self._reduce(y)

    def feed(self, linear: Linear) -> None:
        """Nothing but `linear` takes what this gated one makes: it may be rounded for it at once."""
        if isinstance(self.op, GatedLinear):
            self.op.fed = linear.asks()

    def asks(self) -> Callable[[], kernels.Rounding | None] | None:
        """How this linear wants its input, to be asked at each step: who watches inputs puts an `op` in place that wants them as they are.
        None: it never wants them rounded."""
        return None if self.op.rounding is None else lambda: getattr(self.op, "rounding", None)

    @property
    def nbytes(self) -> int:
        return self.op.nbytes

    def bind(self, buffer: Tensor) -> None:
        self.op.bind(buffer)

    def sources(self, present: Collection[str]) -> Iterator[Source]:
        fused = len(self.projections) > 1 and any(f"{self.name}.{kind}" in present for kind in FUSED)
        total, row, first = sum(rows.total for _, rows in self.projections), 0, 0
        for (name, rows), record in zip(self.projections, self.records, strict=True):
            height = rows.total
            if fused:
                name, rows = self.name, Shard(total, first + rows.start, rows.count)
            yield from matrix_sources(name, record, rows, self.columns, partial(self._load_rows, row), present)
            if self.bias:
                index = (slice(rows.start, rows.start + rows.count if self.adds_bias else rows.start),)
                yield TensorSource(f"{name}.bias", (rows.total,), index, partial(self.op.load_bias, row=row))
            row += rows.count
            first += height

    def _load_rows(self, start: int, weight: Any, row: int) -> None:
        self.op.load_rows(weight, start + row)

    def describe(self) -> dict[str, Any]:
        return {"linears": [asdict(spec) for spec in self.specs]}


def _merge(schemes: Sequence[str], widths: Sequence[int]) -> list[tuple[str, int]]:
    """Neighbours that one product can hold: of one scheme that neither reorders inputs nor rounds them by a number of each one's own,
    the rows that share scales not cut."""
    merged: list[tuple[str, int]] = []
    for name, width in zip(schemes, widths, strict=True):
        scheme = Scheme.parse(name)
        own_input = scheme.weight.permuted or (scheme.activation is not None and scheme.activation.scale == "static")
        whole = not scheme.weight.is_float and scheme.weight.block[0] == 0
        if merged and merged[-1][0] == name and not own_input and not whole and merged[-1][1] % max(scheme.weight.block[0], 1) == 0:
            merged[-1] = name, merged[-1][1] + width
        else:
            merged.append((name, width))
    return merged


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
        # Cut and transposed, so in floating point whatever the checkpoint has.
        self.record = LinearRecord(site.records.dtype, site.records.of(site.name).layout)
        rows = part.stop - part.start
        shape = (columns, rows) if transposed else (rows, columns)
        self.ops = [site.ops.linear(LinearSpec(*shape, self.record.scheme)) for _ in range(heads.count)]
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

    def sources(self, present: Collection[str]) -> Iterator[Source]:
        height = self.height
        rows = Shard(self.heads.total * height, self.heads.start * height, self.heads.count * height)
        if self.record.layout is not None:
            yield from matrix_sources(self.source, self.record, rows, Shard.whole(self.columns), self._load_heads, present)
            return
        for head, op in enumerate(self.ops):
            first = rows.start + head * height
            index = (slice(first + self.part.start, first + self.part.stop), slice(None))
            yield TensorSource(f"{self.source}.weight", (rows.total, self.columns), index, partial(self._load, op))

    def _load_heads(self, weight: Tensor, row: int) -> None:
        for op, rows in zip(self.ops, weight.split(self.height), strict=True):
            self._load(op, rows[self.part])

    def _load(self, op: Any, weight: Tensor) -> None:
        op.load_rows(weight.T.contiguous() if self.transposed else weight, 0)

    def describe(self) -> dict[str, Any]:
        return asdict(self.ops[0].spec) | {"heads": len(self.ops)}


def replicated(site: Site, out_features: int, in_features: int, slot: str, bias: bool = False) -> Linear:
    """The whole matrix on every rank."""
    return Linear(site, [(site.name, Shard.whole(out_features))], Shard.whole(in_features), slot, bias)


def column_parallel(site: Site, out_features: int, in_features: int, slot: str, bias: bool = False) -> Linear:
    """Each rank computes its share of the outputs."""
    return Linear(site, [(site.name, Shard.even(out_features, site.group))], Shard.whole(in_features), slot, bias)


def row_parallel(site: Site, out_features: int, in_features: int, slot: str, bias: bool = False) -> Linear:
    """Each rank multiplies its share of the inputs; the results are summed over ranks."""
    return Linear(site, [(site.name, Shard.whole(out_features))], Shard.even(in_features, site.group), slot, bias, reduce=True)


def kv_heads(site: Site, num_kv_heads: int) -> Shard:
    """This rank's key-value heads. With more ranks than heads, neighbouring ranks hold the same ones."""
    rank, size = site.group.rank, site.group.size
    kept = max(1, num_kv_heads // size)
    return Shard(num_kv_heads, rank * kept if num_kv_heads >= size else rank * num_kv_heads // size, kept)


def qkv(site: Site, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool = False) -> Linear:
    """q_proj, k_proj and v_proj of `site` as one matrix: this rank's query heads, then its key heads, then its value heads."""
    heads = kv_heads(site, num_kv_heads)
    queries = Shard.even(num_heads * head_dim, site.group)
    keys = Shard(num_kv_heads * head_dim, heads.start * head_dim, heads.count * head_dim)
    projections = [((site / part).name, shard) for part, shard in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))]
    return Linear(site / "qkv_proj", projections, Shard.whole(hidden), "qkv", bias)


def gate_up(site: Site, hidden: int, ffn: int, bias: bool = False, slot: str = "gated") -> Linear:
    """silu(gate_proj x) * (up_proj x) of `site` as one gated linear."""
    shard = Shard.even(ffn, site.group)
    projections = [((site / part).name, shard) for part in ("gate_proj", "up_proj")]
    return Linear(site / "gate_up_proj", projections, Shard.whole(hidden), slot, bias, gated=True)
