"""The CPU operators as one set for one thread team and one instruction set."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apportion.kernels.cpu.attention import LatentAttention, PagedAttention, Rotary
from apportion.kernels.cpu.elementwise import Elementwise
from apportion.kernels.cpu.experts import PackedExperts
from apportion.kernels.cpu.extension import load
from apportion.kernels.cpu.linear import PackedLinear
from apportion.kernels.cpu.sampling import Sampling
from apportion.kernels.ops import AttentionSpec, ExpertsSpec, LinearSpec


class CpuOps:
    """`kernels.ops.Ops` on the CPU.

    team: the `_cpu.ThreadTeam` whose threads compute; the calling thread is its first. isa: pins an instruction set, None takes
    the chosen one. Objects made by a CpuOps keep its set; several sets may live side by side (tests compare them).
    """

    def __init__(self, team: Any, isa: str | None = None) -> None:
        self._module = load()
        self.team = team
        self.isa: str = isa or self._module.features()["isa"]
        self.name = f"cpu-{self.isa}"
        self._module.select_isa(self.isa)
        rows = Elementwise(team)
        self.rms_norm, self.add_rms_norm, self.silu_mul, self.route = rows.rms_norm, rows.add_rms_norm, rows.silu_mul, rows.route
        self.rotate = Rotary(team).rotate
        sampling = Sampling(team)
        self.sample, self.logprobs = sampling.sample, sampling.logprobs

    def linear(self, spec: LinearSpec) -> PackedLinear:
        self._module.select_isa(self.isa)
        return PackedLinear(self.team, spec)

    def experts(self, spec: ExpertsSpec) -> PackedExperts:
        self._module.select_isa(self.isa)
        return PackedExperts(self.team, spec)

    def paged_attention(self, spec: AttentionSpec, arena: Tensor) -> PagedAttention:
        self._module.select_isa(self.isa)
        return PagedAttention(self.team, spec, arena)

    def latent_attention(self, spec: AttentionSpec, arena: Tensor) -> LatentAttention:
        self._module.select_isa(self.isa)
        return LatentAttention(self.team, spec, arena)
