"""The CPU operators as one set for one thread team and one instruction set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apportion.core.number_format import Scheme
from apportion.kernels.cpu import BF16_PRODUCTS, BYTE_PRODUCTS
from apportion.kernels.cpu.attention import LatentAttention, PagedAttention, Rotary
from apportion.kernels.cpu.elementwise import Elementwise
from apportion.kernels.cpu.experts import PackedExperts
from apportion.kernels.cpu.extension import load
from apportion.kernels.cpu.formats import multiplies_bytes, obstacle
from apportion.kernels.cpu.linear import PackedLinear
from apportion.kernels.cpu.sampling import Sampling
from apportion.kernels.interval_table import Choice, IntervalTable
from apportion.kernels.ops import AttentionSpec, Experts, ExpertsSpec, Linear, LinearSpec
from apportion.kernels.reference.linear import DequantizedLinear, ReferenceExperts

logger = logging.getLogger(__name__)


class CpuOps:
    """`kernels.ops.Ops` on the CPU.

    team: the `_cpu.ThreadTeam` whose threads compute; the calling thread is its first. isa: pins an instruction set, None takes
    the chosen one. Objects made by a CpuOps keep its set; several sets may live side by side (tests compare them).
    table: how to multiply how many tokens, where it was measured.
    """

    device = torch.device("cpu")

    def __init__(self, team: Any, isa: str | None = None, table: IntervalTable | None = None) -> None:
        self._module = load()
        self.team = team
        self.isa: str = isa or self._module.features()["isa"]
        self.name = f"cpu-{self.isa}"
        self._module.select_isa(self.isa)
        self._announced: set[str] = set()
        self._table = table
        rows = Elementwise(team)
        self.rms_norm, self.add_rms_norm, self.silu_mul, self.route = rows.rms_norm, rows.add_rms_norm, rows.silu_mul, rows.route
        self.rotate = Rotary(team).rotate
        sampling = Sampling(team)
        self.sample, self.logprobs, self.apply_bitmask = sampling.sample, sampling.logprobs, sampling.apply_bitmask

    def recording(self) -> Any:
        return self._module.Recording(self.team)

    def linear(self, spec: LinearSpec) -> Linear:
        """Packed panels; a scheme that the kernels do not take is dequantized in panels for the float32 one."""
        self._announce(spec.scheme)
        if obstacle(spec.scheme):
            return DequantizedLinear(spec, self.linear)
        self._module.select_isa(self.isa)
        return PackedLinear(self.team, spec, self._choose(spec))

    def _choose(self, spec: LinearSpec) -> Callable[[int], Choice] | None:
        if self._table is None:
            return None
        found = self._table.rows.get((spec.scheme, spec.out_features, spec.in_features))
        if found is not None:
            return found.at
        if "table" not in self._announced:
            self._announced.add("table")
            logger.info("kernels: %s", self.explain(spec.scheme, spec.out_features, spec.in_features, 1))
        return None

    def explain(self, scheme: str, n: int, c: int, num_tokens: int) -> str:
        """What multiplies, and the measured row that says so."""
        if self._table is None:
            return f"{self.name} has no dispatch table"
        return self._table.explain(scheme, n, c, num_tokens)

    def experts(self, spec: ExpertsSpec) -> Experts:
        """One grouped operator, each projection of each expert in its own scheme; linear by linear where the kernels do not take one."""
        for scheme in {scheme for schemes in spec.schemes for scheme in schemes}:
            self._announce(scheme)
        if any(obstacle(scheme) for schemes in spec.schemes for scheme in schemes):
            return ReferenceExperts(spec, self.linear, self.silu_mul)
        self._module.select_isa(self.isa)
        return PackedExperts(self.team, spec)

    def _announce(self, scheme: str) -> None:
        """Say once how linears of a scheme are computed; slow ones as a warning."""
        if scheme not in self._announced:
            self._announced.add(scheme)
            logger.log(logging.WARNING if obstacle(scheme) else logging.INFO, "linears in %s: %s", scheme, self.method(scheme))

    def method(self, scheme: str) -> str:
        """How a linear of a scheme is computed, in words."""
        why = obstacle(scheme)
        if why:
            return f"the reference path, dequantized for every call: the packed kernels do not take it ({why})"
        parsed = Scheme.parse(scheme)
        if multiplies_bytes(scheme, self.isa):
            return f"packed panels, multiplied in {BYTE_PRODUCTS[self.isa]}"
        if self.isa not in BF16_PRODUCTS or (parsed.weight.is_float and parsed.weight.element != "bfloat16"):
            return "packed panels, multiplied in float32"
        return f"packed panels, multiplied in {BF16_PRODUCTS[self.isa]}"

    def paged_attention(self, spec: AttentionSpec, arena: Tensor) -> PagedAttention:
        self._module.select_isa(self.isa)
        return PagedAttention(self.team, spec, arena)

    def latent_attention(self, spec: AttentionSpec, arena: Tensor) -> LatentAttention:
        self._module.select_isa(self.isa)
        return LatentAttention(self.team, spec, arena)
