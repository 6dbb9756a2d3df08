"""The grouped GEMM over experts whose projections are stored in formats of their own (MxMoE's mixed group).

Tokens are dealt into tiles of one expert each, as kernels/triton/experts does; then each projection is launched once for each format that
any expert has it in, and tiles of experts in other formats end at once. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.core.number_format import FLOATS, Scheme
from apportion.kernels.ops import ExpertsSpec, LinearSpec, RoundedRows
from apportion.kernels.reference.linear import ReferenceExperts, ReferenceLinear
from apportion.kernels.reference.number_formats import TORCH_DTYPES
from apportion.kernels.triton.elementwise import silu_mul
from apportion.kernels.triton.experts import Dealt, deal, weigh
from apportion.kernels.triton.linear import plain_sums
from apportion.kernels.triton.quantized import CodedLinear, coded_sums, x_constants
from apportion.kernels.triton.rounding import Rounding
from apportion.kernels.triton.tiles import Tile


@triton.jit
def grouped_kernel(
    x, x_stride, x_scale, codes, scale, zero, offsets, slots, tile_expert, out, out_stride, top_k, n, c, width, num_scales,
    FLOAT: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, ZERO: tl.constexpr, N_BLOCK: tl.constexpr,
    K_GROUP: tl.constexpr, X_SCALES: tl.constexpr, X_GROUP: tl.constexpr, PRODUCT: tl.constexpr, FROM_TOKEN: tl.constexpr,
    TO_PAIR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One projection of the experts in one format. offsets int64 [E, 3]: where codes, scales and zeros begin; below 0: another format.

    FROM_TOKEN: x has a row for each token, else for each slot. TO_PAIR: out [pairs, N], else [slots, N].
    """
    tile = tl.program_id(1)
    expert = tl.load(tile_expert + tile)
    start = tl.load(offsets + tl.maximum(expert, 0) * 3)
    if (expert >= 0) & (start >= 0):
        start = tl.multiple_of(start, 64)  # 256 bytes of numbers of at most 4: without the hint bytes would be fetched one by one
        lanes = tl.arange(0, BLOCK_T)
        slot = (tile * BLOCK_T + lanes).to(tl.int64)
        pair = tl.load(slots + slot)
        rows = (pair // top_k).to(tl.int64) if FROM_TOKEN else slot
        outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n, inside_t = outputs < n, pair >= 0
        if FLOAT:
            sums = plain_sums(x, x_stride, rows, inside_t, codes + start, c, outputs, inside_n, 0, c, BLOCK_T, BLOCK_N, BLOCK_K)
        else:
            s_start, z_start = tl.load(offsets + expert * 3 + 1), tl.load(offsets + expert * 3 + 2)
            sums = coded_sums(
                x, x_stride, rows, inside_t, x_scale, codes + start, scale + s_start, zero + z_start, outputs, n, 0, c, width,
                num_scales, BITS, MANTISSA, FACTOR, ZERO, N_BLOCK, K_GROUP, X_SCALES, X_GROUP, PRODUCT, BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        to = pair.to(tl.int64) if TO_PAIR else slot
        tl.store(out + to[None, :] * out_stride + outputs[:, None], sums, mask=inside_n[:, None] & inside_t[None, :])


class _Inputs:
    """Inputs of a projection as its formats want them, each made once. gated: rows are gates, then ups."""

    def __init__(self, rows: Tensor, gated: bool) -> None:
        self._rows, self._gated = rows, gated
        self._made: dict[Any, RoundedRows] = {}

    def rounded(self, rounding: Rounding | None) -> RoundedRows:
        key = None if rounding is None else (rounding.fmt.name, rounding.dtype)
        if key not in self._made:
            if rounding is None:
                self._made[key] = RoundedRows(silu_mul(self._rows) if self._gated else self._rows, None)
            else:
                self._made[key] = rounding.silu_mul(self._rows) if self._gated else rounding(self._rows)
        return self._made[key]


class _Format:
    """The experts that have a projection in one scheme. linear: any of theirs."""

    def __init__(self, scheme: str, linear: Any, tile: Tile) -> None:
        self.linear, self.is_float = linear, scheme in FLOATS
        self.rounding: Rounding | None = None if self.is_float else linear.rounding
        self.dtype = TORCH_DTYPES[scheme] if self.is_float else linear.code_dtype
        self.tile = tile if self.is_float else linear.tiles[0]
        self.starts: dict[int, tuple[int, int, int]] = {}

    def add(self, expert: int, linear: Any, start: int) -> None:
        """start: bytes from the buffer's beginning to the linear's."""
        if self.is_float:
            self.starts[expert] = (start // self.dtype.itemsize, 0, 0)
            return
        at = {name: (start + offset) // dtype.itemsize for name, offset, dtype, _ in linear.parts}
        self.starts[expert] = (start // self.dtype.itemsize, at["scale"], at.get("zero", at["scale"]))  # codes come first

    def bind(self, buffer: Tensor, num_experts: int) -> None:
        rows = [self.starts.get(expert, (-1, 0, 0)) for expert in range(num_experts)]
        self.offsets = torch.tensor(rows, dtype=torch.int64).to(buffer.device)
        self.codes = buffer.view(self.dtype)
        types = {} if self.is_float else {name: dtype for name, _, dtype, _ in self.linear.parts}
        self.scale = buffer.view(types.get("scale", torch.float32))
        self.zero = buffer.view(types.get("zero", self.scale.dtype))


def _obstacle(scheme: str) -> str:
    """What experts that share their tokens cannot each do."""
    parsed = Scheme.parse(scheme)
    if parsed.activation is not None and parsed.activation.scale == "static":
        return "round the tokens by a scale of its own"
    return "take the tokens' channels in an order of its own" if parsed.weight.permuted else ""


class MixedExperts(ReferenceExperts):
    """kernels/ops.Experts of any schemes: one linear for each expert and projection, side by side in the buffer."""

    def __init__(self, spec: ExpertsSpec, tile: Tile, units: Collection[str]) -> None:
        self.tile, self.units = tile, units
        super().__init__(spec, self._make, silu_mul)
        self._formats: dict[str, dict[str, _Format]] = {"gate": {}, "up": {}, "down": {}}
        start = 0
        for expert, linears in enumerate(self._linears):
            for projection, linear in linears.items():
                scheme = linear.spec.scheme
                if obstacle := _obstacle(scheme):
                    raise Unsupported(f"experts in {scheme} have no grouped Triton kernel: each would {obstacle}; take device=cpu")
                formats = self._formats[projection]
                formats.setdefault(scheme, _Format(scheme, linear, tile)).add(expert, linear, start)
                start += -(-linear.nbytes // 256) * 256

    def _make(self, spec: LinearSpec) -> Any:
        return ReferenceLinear(spec) if spec.scheme in FLOATS else CodedLinear(spec, [self.tile], self.units)

    def bind(self, buffer: Tensor) -> None:
        super().bind(buffer)
        for formats in self._formats.values():
            for format_ in formats.values():
                format_.bind(buffer, self.spec.num_experts)

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        e, f, m = self.spec.num_experts, self.spec.ffn, self.spec.hidden
        out = torch.empty((len(x), m), dtype=x.dtype, device=x.device)
        if not expert_ids.numel():
            return out
        dealt = deal(expert_ids, e)
        tokens = _Inputs(x, gated=False)
        joint = torch.empty((len(dealt.slots), 2 * f), dtype=torch.float32, device=x.device)
        self._project("gate", tokens, joint[:, :f], dealt)
        self._project("up", tokens, joint[:, f:], dealt)
        parts = torch.empty((expert_ids.numel(), m), dtype=torch.float32, device=x.device)
        self._project("down", _Inputs(joint, gated=True), parts, dealt)
        return weigh(parts, expert_ids, expert_weights, out)

    def _project(self, projection: str, inputs: _Inputs, out: Tensor, dealt: Dealt) -> None:
        down = projection == "down"
        for format_ in self._formats[projection].values():
            seen, tile, spec = inputs.rounded(format_.rounding), format_.tile, format_.linear.spec
            constants = _FLOAT if format_.is_float else format_.linear.constants
            width, scales = (0, 0) if format_.is_float else (format_.linear.width, format_.linear.num_scales)
            grouped_kernel[(triton.cdiv(spec.out_features, tile.n), dealt.num_tiles)](
                seen.codes, seen.codes.stride(0), seen.codes if seen.scales is None else seen.scales, format_.codes, format_.scale,
                format_.zero, format_.offsets, dealt.slots, dealt.tile_expert, out, out.stride(0), dealt.top_k, spec.out_features,
                spec.in_features, width, scales, FLOAT=format_.is_float, **constants, **x_constants(format_.rounding, seen),
                FROM_TOKEN=not down, TO_PAIR=down, BLOCK_T=dealt.block_t, BLOCK_N=tile.n, BLOCK_K=tile.k, **tile.launch,
            )  # fmt: skip


_FLOAT: dict[str, Any] = {
    "BITS": 8, "MANTISSA": 0, "FACTOR": 1.0, "ZERO": 0, "N_BLOCK": 0, "K_GROUP": 0, "PRODUCT": "float",
}  # fmt: skip
