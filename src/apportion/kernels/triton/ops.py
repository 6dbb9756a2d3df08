"""The Triton operators as one set: our kernels where the project's subject is, the library's where it is not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from apportion.core.number_format import FLOATS
from apportion.kernels.interval_table import LIBRARY, Choice, IntervalTable
from apportion.kernels.ops import AttentionSpec, ExpertsSpec, LinearSpec
from apportion.kernels.triton import attention, elementwise, quantized, sampling
from apportion.kernels.triton.attention import LatentAttention, PagedAttention
from apportion.kernels.triton.device import float8_units
from apportion.kernels.triton.experts import GroupedExperts
from apportion.kernels.triton.linear import TritonLinear
from apportion.kernels.triton.mixed_experts import MixedExperts
from apportion.kernels.triton.quantized import CodedLinear
from apportion.kernels.triton.tiles import MOST_ROWS, Tiles

logger = logging.getLogger(__name__)


class TritonOps:
    """kernels/ops.Ops. interpreted: on the CPU, by Triton's interpreter, every product by our own kernels: for tests.

    shared_bytes: the largest shared memory of a block. table: which linears the library multiplies (those without a
    row too); None: none.
    """

    name = "triton"

    def __init__(self, interpreted: bool, device: torch.device, shared_bytes: int, table: IntervalTable | None = None) -> None:
        self.device = device
        self._told: set[str] = set()
        self._table = None if interpreted else table
        self._interpreted = interpreted
        self.tiles = Tiles().within(shared_bytes)
        self.units = ("e4m3",) if interpreted else float8_units()
        self.rms_norm, self.add_rms_norm, self.silu_mul = elementwise.rms_norm, elementwise.add_rms_norm, elementwise.silu_mul
        self.rotate, self.route = elementwise.rotate, elementwise.route
        self.sample, self.logprobs, self.apply_bitmask = sampling.sample, sampling.logprobs, sampling.apply_bitmask

    def recording(self) -> None:
        """A GPU's steps are kept as graphs (platforms/platform)."""
        return None

    def linear(self, spec: LinearSpec) -> TritonLinear | CodedLinear:
        if spec.scheme not in FLOATS:
            return self._coded(spec)
        return TritonLinear(spec, self.tiles.flat, self._choose(spec))

    def _coded(self, spec: LinearSpec) -> CodedLinear:
        obstacle = "kernels are interpreted" if self._interpreted else quantized.library_obstacle(spec, self.units)
        row = None if obstacle or self._table is None else self._table.rows.get((spec.scheme, spec.out_features, spec.in_features))
        usual = f"the library beyond {MOST_ROWS} tokens" if row is None else "the library where the dispatch table says so"
        self._tell(spec.scheme, f"; never by the library: {obstacle}" if obstacle else f"; by {usual}")
        return CodedLinear(spec, self.tiles.flat, self.units, None if row is None else row.at, library=not obstacle)

    def method(self, scheme: str) -> str:
        """How a linear of a scheme is computed, in words."""
        if scheme in FLOATS:
            return "the flat kernel or the library, as the dispatch table says"
        return quantized.method(scheme, self.units)

    def _tell(self, scheme: str, more: str = "") -> None:
        """Say once how linears of a scheme are computed; slow ones as a warning."""
        words = quantized.method(scheme, self.units)
        self._say(f"linears in {scheme}: {words}{more}", logging.WARNING if "float32" in words else logging.INFO)

    def _say(self, words: str, level: int = logging.INFO) -> None:
        if words not in self._told:
            self._told.add(words)
            logger.log(level, words)

    def _choose(self, spec: LinearSpec) -> Callable[[int], Choice] | None:
        if self._table is None:
            return None
        found = self._table.rows.get((spec.scheme, spec.out_features, spec.in_features))
        if found is not None:
            return found.at
        if self._table.device not in self._told:
            self._told.add(self._table.device)
            logger.info("kernels: %s", self._table.explain(spec.scheme, spec.out_features, spec.in_features, 1))
        return lambda num_tokens: LIBRARY

    def experts(self, spec: ExpertsSpec) -> GroupedExperts | MixedExperts:
        found = {scheme for schemes in spec.schemes for scheme in schemes}
        if len(found) == 1 and found <= set(FLOATS):
            return GroupedExperts(spec, self.tiles.experts[0])
        for scheme in found - set(FLOATS):
            self._tell(scheme)
        return MixedExperts(spec, self.tiles.experts[0], self.units)

    def paged_attention(self, spec: AttentionSpec, arena: Tensor) -> PagedAttention:
        obstacle = "kernels are interpreted" if self._interpreted else attention.library_obstacle(spec)
        said = f"the paged kernel: {obstacle}" if obstacle else "torch's scaled_dot_product_attention"
        self._say(f"prompts that come whole are attended for by {said}")
        return PagedAttention(spec, arena, self.tiles.decode[0], self.tiles.prefill[0], library=not obstacle)

    def latent_attention(self, spec: AttentionSpec, arena: Tensor) -> LatentAttention:
        return LatentAttention(spec, arena, self.tiles.latent_decode[0], self.tiles.latent_prefill[0])
