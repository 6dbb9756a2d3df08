"""Mixtures of experts: a router, the routed experts as one grouped operator, and shared experts that every token passes through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from apportion.core.errors import InternalError
from apportion.kernels.ops import ExpertsSpec, RouteSpec
from apportion.layers.linear import replicated
from apportion.layers.mlp import GatedMLP
from apportion.layers.site import Site
from apportion.layers.weights import JointSource, Shard, Source, TensorSource, load_floats, load_stored, matrix_sources
from apportion.quant.scheme import LinearRecord

PROJECTIONS = ("gate", "up", "down")
# A sigmoid by the router's operator: torch's own gives a row other bits depending on how many rows there are.
OPEN = RouteSpec(num_experts=1, top_k=1, scoring="sigmoid", renormalize=False)


class MixtureOfExperts(nn.Module):
    """x [T, M] -> [T, M].

    Names below `site`: gate, experts; shared_name: the shared experts' part where the model has them (they are one MLP of their joint
    width), shared_gate_name: the part whose sigmoid scales their output. The router and that gate are kept in float32: they are small, and
    a rounding there sends a token to another expert.
    """

    def __init__(self, site: Site, shared_name: str = "", shared_gate_name: str = "") -> None:
        super().__init__()
        spec = site.spec
        if spec.moe is None:
            raise InternalError(f"{site.name} is built as a mixture, but the model's spec has none")
        moe = spec.moe
        exact = replace(site, records=site.records.widened("float32"))
        self.gate = replicated(exact / "gate", moe.num_experts, spec.hidden, "router_logits")
        self.experts = Experts(site / "experts", moe.num_experts, moe.ffn)
        self.shared = GatedMLP(site / shared_name, moe.shared_ffn, spec.mlp_bias, slots="shared_") if shared_name else None
        self.shared_gate = replicated(exact / shared_gate_name, 1, spec.hidden, "shared_gate") if shared_gate_name else None
        self._route = site.ops.route
        self._spec = RouteSpec(moe.num_experts, moe.top_k, moe.scoring, moe.renormalize, moe.num_groups, moe.top_groups, moe.scale)

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self._route(self.gate.forward(x), self._spec)
        y = self.experts.forward(x, ids, weights)
        if self.shared is None:
            return y
        shared = self.shared.forward(x)
        if self.shared_gate is not None:
            _, openness = self._route(self.shared_gate.forward(x), OPEN)
            shared *= openness
        return y.add_(shared)


class Experts(nn.Module):
    """The routed experts of one layer; every rank holds its share of each expert's width, and results are summed over ranks.

    A checkpoint has them one by one (`experts.3.up_proj.weight` [F, M]) or fused (`experts.gate_up_proj` [E, 2F, M], gates first, and
    `experts.down_proj` [E, M, F]).
    """

    def __init__(self, site: Site, num_experts: int, ffn: int) -> None:
        super().__init__()
        self.name = site.name
        self.num_experts, self.hidden = num_experts, site.spec.hidden
        self.shard = Shard.even(ffn, site.group)
        self.records: list[dict[str, LinearRecord]] = [
            {projection: site.records.of(f"{self.name}.{e}.{projection}_proj") for projection in PROJECTIONS} for e in range(num_experts)
        ]
        gates, ups, downs = ([records[projection].scheme for records in self.records] for projection in PROJECTIONS)
        schemes = tuple(zip(gates, ups, downs, strict=True))
        self.op = site.ops.experts(
            ExpertsSpec(num_experts, self.hidden, self.shard.count, schemes[:1] if len(set(schemes)) == 1 else schemes)
        )
        self._reduce = site.group.all_reduce if site.group.size > 1 else None

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x [T, M], ids int32 [T, k], weights [T, k] -> a tensor of its own [T, M]."""
        y = self.op(x, expert_ids, expert_weights)
        return y if self._reduce is None else self._reduce(y)

    @property
    def nbytes(self) -> int:
        return self.op.nbytes

    def bind(self, buffer: Tensor) -> None:
        self.op.bind(buffer)

    def sources(self, present: Collection[str]) -> Iterator[Source]:
        fused = f"{self.name}.gate_up_proj" in present
        for expert, records in enumerate(self.records):
            for projection, record in records.items():
                rows, columns = self.shard, Shard.whole(self.hidden)
                if projection == "down":
                    rows, columns = columns, rows
                load = partial(self._load, expert, projection)
                if fused and record.layout is not None:
                    yield self._fused_stored(expert, projection, rows, columns, record, load, present)
                elif fused:
                    yield self._fused_source(expert, projection, rows, columns, record, load)
                else:
                    yield from matrix_sources(f"{self.name}.{expert}.{projection}_proj", record, rows, columns, load, present)

    def _fused_source(
        self, expert: int, projection: str, rows: Shard, columns: Shard, record: LinearRecord, load: Callable[[Any, int], None]
    ) -> TensorSource:
        name = f"{self.name}.{'down_proj' if projection == 'down' else 'gate_up_proj'}"
        height = rows.total if projection == "down" else 2 * rows.total
        first = rows.start + rows.total * (projection == "up")
        index = (slice(expert, expert + 1), slice(first, first + rows.count), columns.slice)
        return TensorSource(name, (self.num_experts, height, columns.total), index, partial(load_floats, name, record, load, 0))

    def _fused_stored(
        self, expert: int, projection: str, rows: Shard, columns: Shard, record: LinearRecord, load: Callable[[Any, int], None],
        present: Collection[str],
    ) -> JointSource:  # fmt: skip
        """The tensors of a layout with one more axis, the expert: `x.weight` is called x, `x.weight_scale` x_scale or x_weight_scale."""
        assert record.layout is not None
        name = f"{self.name}.{'down_proj' if projection == 'down' else 'gate_up_proj'}"
        whole = rows if projection == "down" else Shard(2 * rows.total, rows.start + rows.total * (projection == "up"), rows.count)
        spelt, shapes = {}, {}
        known = {f"{name}.{kind}" for kind in ("weight_scale", "weight_scale_inv") if f"{name}_{kind.removeprefix('weight_')}" in present}
        for tensor, allowed in record.layout.tensors(name, (whole.total, columns.total), known).items():
            suffix = tensor.removeprefix(f"{name}.")
            names = [name] if suffix == "weight" else [f"{name}_{suffix}", f"{name}_{suffix.removeprefix('weight_')}"]
            spelt[tensor] = next((n for n in names if n in present), names[-1])
            shapes[spelt[tensor]] = tuple((self.num_experts, *shape) for shape in allowed)

        def take(tensors: Mapping[str, Tensor]) -> None:
            own = {tensor: tensors[stored][expert] for tensor, stored in spelt.items()}
            load_stored(name, record, whole, columns, load, own)

        return JointSource(shapes, take)

    def _load(self, expert: int, projection: str, weight: Any, row: int) -> None:
        self.op.load(expert, projection, weight, row)

    def describe(self) -> dict[str, Any]:
        return asdict(self.op.spec)
