"""The reference operators as one set: plain torch, the oracle of every kernel and the whole engine where nothing is compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.core.number_format import FLOATS
from apportion.kernels.ops import AttentionSpec, ExpertsSpec, Linear, LinearSpec, RouteSpec, SamplingRows
from apportion.kernels.reference import elementwise, sampling
from apportion.kernels.reference.attention import ReferenceLatentAttention, ReferencePagedAttention
from apportion.kernels.reference.linear import DequantizedLinear, ReferenceExperts, ReferenceLinear


class ReferenceOps:
    """kernels/ops.Ops in plain torch."""

    name = "reference"
    device = torch.device("cpu")

    def recording(self) -> None:
        """Torch's own calls cannot be kept."""

    def linear(self, spec: LinearSpec) -> Linear:
        return ReferenceLinear(spec) if spec.scheme in FLOATS else DequantizedLinear(spec, self.linear)

    def experts(self, spec: ExpertsSpec) -> ReferenceExperts:
        return ReferenceExperts(spec, self.linear, self.silu_mul)

    def paged_attention(self, spec: AttentionSpec, arena: Tensor) -> ReferencePagedAttention:
        return ReferencePagedAttention(spec, arena)

    def latent_attention(self, spec: AttentionSpec, arena: Tensor) -> ReferenceLatentAttention:
        return ReferenceLatentAttention(spec, arena)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        y = elementwise.rms_norm(x, weight, eps)
        return y if out is None else out.copy_(y)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        return self.rms_norm(residual.add_(x), weight, eps, out)

    def silu_mul(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = elementwise.silu_mul(x)
        return y if out is None else out.copy_(y)

    def rotate(self, x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
        elementwise.rotate(x, positions, cos_sin, interleaved)

    def route(self, logits: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
        return elementwise.route(logits, spec)

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        return sampling.sample(logits, rows)

    def apply_bitmask(self, logits: Tensor, rows: Tensor, masks: Tensor) -> None:
        sampling.apply_bitmask(logits, rows, masks)

    def logprobs(self, logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return sampling.logprobs(logits, token_ids, top_n)
