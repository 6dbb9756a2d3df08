"""Mixtures of experts: a router, the routed experts as one grouped operator, and shared experts that every token passes through."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from apportion.core.errors import InternalError
from apportion.kernels.ops import ExpertsSpec, RouteSpec
from apportion.layers.linear import replicated
from apportion.layers.mlp import GatedMLP
from apportion.layers.site import Site
from apportion.layers.weights import Shard, TensorSource
from apportion.quant.scheme import LinearRecord, LinearRecords

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
        exact = replace(site, records=LinearRecords(LinearRecord("float32")))
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
        parts = [[f"{self.name}.{e}.{projection}_proj" for projection in PROJECTIONS] for e in range(num_experts)]
        dtypes = tuple(site.records.of(*names).dtype for names in parts)
        alike = dtypes[:1] if len(set(dtypes)) == 1 else dtypes
        self.op = site.ops.experts(ExpertsSpec(num_experts, self.hidden, self.shard.count, alike))
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

    def sources(self, present: Collection[str]) -> Iterator[TensorSource]:
        fused = f"{self.name}.gate_up_proj" in present
        total, everything = self.shard.total, slice(None)
        for expert in range(self.num_experts):
            for projection in PROJECTIONS:
                first = self.shard.start + total * (fused and projection == "up")
                width = slice(first, first + self.shard.count)
                index = (everything, width) if projection == "down" else (width, everything)
                shape = (self.hidden, total) if projection == "down" else (total, self.hidden)
                load = partial(self._load, expert, projection)
                if not fused:
                    yield TensorSource(f"{self.name}.{expert}.{projection}_proj.weight", shape, index, load)
                    continue
                name = f"{self.name}.{'down_proj' if projection == 'down' else 'gate_up_proj'}"
                whole = (self.num_experts, *shape) if projection == "down" else (self.num_experts, 2 * total, self.hidden)
                yield TensorSource(name, whole, (slice(expert, expert + 1), *index), load)

    def _load(self, expert: int, projection: str, weight: Tensor) -> None:
        self.op.load(expert, projection, weight.view(weight.shape[-2:]))

    def describe(self) -> dict[str, Any]:
        return asdict(self.op.spec) | {"dtypes": list(self.op.spec.dtypes)}
