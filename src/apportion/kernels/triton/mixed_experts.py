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
from apportion.kernels.triton.experts import CHUNK, align_kernel, tile_bound, weigh_kernel
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
            inner = tl.arange(0, BLOCK_K)
            place = codes + start + outputs.to(tl.int64)[:, None] * c + inner[None, :]
            sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            for k in range(0, c, BLOCK_K):
                inside_k = k + inner < c
                mask = inside_k[:, None] & inside_t[None, :]
                seen = tl.load(x + rows[None, :] * x_stride + (k + inner)[:, None], mask=mask, other=0.0).to(codes.dtype.element_ty)
                w = tl.load(place + k, mask=inside_n[:, None] & inside_k[None, :], other=0.0)
                sums = tl.dot(w, seen, sums, input_precision="ieee")
        else:
            s_start, z_start = tl.load(offsets + expert * 3 + 1), tl.load(offsets + expert * 3 + 2)
            sums = coded_sums(
                x, x_stride, rows, inside_t, x_scale, codes + start, scale + s_start, zero + z_start, outputs, n, 0, c, width,
                num_scales, BITS, MANTISSA, FACTOR, ZERO, N_BLOCK, K_GROUP, X_SCALES, X_GROUP, PRODUCT, BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        to = pair.to(tl.int64) if TO_PAIR else slot
        tl.store(out + to[None, :] * out_stride + outputs[:, None], sums, mask=inside_n[:, None] & inside_t[None, :])


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
        rows, top_k = expert_ids.shape
        e, f, m = self.spec.num_experts, self.spec.ffn, self.spec.hidden
        out = torch.empty((rows, m), dtype=x.dtype, device=x.device)
        pairs = rows * top_k
        if not pairs:
            return out
        block_t = 16 if pairs <= 16 * e else 64
        tiles = tile_bound(pairs, e, block_t)
        table = torch.full((tiles * (block_t + 1),), -1, dtype=torch.int32, device=x.device)
        slots, tile_expert = table[: tiles * block_t], table[tiles * block_t :]
        align_kernel[(1,)](
            expert_ids, pairs, slots, tile_expert, EXPERTS=e, BLOCK_T=block_t, BLOCK_E=triton.next_power_of_2(e), CHUNK=CHUNK
        )
        joint = torch.empty((tiles * block_t, 2 * f), dtype=torch.float32, device=x.device)
        where = (slots, tile_expert, tiles, block_t, top_k)
        self._project("gate", x, joint[:, :f], where, from_token=True, to_pair=False)
        self._project("up", x, joint[:, f:], where, from_token=True, to_pair=False)
        parts = torch.empty((pairs, m), dtype=torch.float32, device=x.device)
        self._project("down", silu_mul(joint), parts, where, from_token=False, to_pair=True)
        block = min(1024, triton.next_power_of_2(m))
        weigh_kernel[(rows, triton.cdiv(m, block))](parts, expert_ids, expert_weights, out, m, TOP_K=top_k, BLOCK=block)
        return out

    def _project(
        self, projection: str, x: Tensor, out: Tensor, where: tuple[Tensor, Tensor, int, int, int], *, from_token: bool, to_pair: bool
    ) -> None:
        slots, tile_expert, tiles, block_t, top_k = where
        rounded: dict[tuple[str, torch.dtype], RoundedRows] = {}
        for format_ in self._formats[projection].values():
            seen, rounding = RoundedRows(x, None), format_.rounding
            if rounding is not None:
                key = rounding.fmt.name, rounding.dtype
                if key not in rounded:
                    rounded[key] = rounding(x)
                seen = rounded[key]
            spec, tile = format_.linear.spec, format_.tile
            n, c = spec.out_features, spec.in_features
            constants = _FLOAT if format_.is_float else format_.linear.constants
            width, scales = (0, 0) if format_.is_float else (format_.linear.width, format_.linear.num_scales)
            grouped_kernel[(triton.cdiv(n, tile.n), tiles)](
                seen.codes, seen.codes.stride(0), x if seen.scales is None else seen.scales, format_.codes, format_.scale, format_.zero,
                format_.offsets, slots, tile_expert, out, out.stride(0), top_k, n, c, width, scales, FLOAT=format_.is_float, **constants,
                **x_constants(rounding, seen), FROM_TOKEN=from_token, TO_PAIR=to_pair, BLOCK_T=block_t, BLOCK_N=tile.n, BLOCK_K=tile.k,
                **tile.launch,
            )  # fmt: skip


_FLOAT: dict[str, Any] = {
    "BITS": 8, "MANTISSA": 0, "FACTOR": 1.0, "ZERO": 0, "N_BLOCK": 0, "K_GROUP": 0, "PRODUCT": "float",
}  # fmt: skip
