"""Norms, gating, rotation and routing as Triton kernels: one program to a row, sums in float32 whatever the activations are stored in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.kernels.ops import RouteSpec


@triton.jit
def normed(x, residual, weight, columns, inside, width, eps, ADD: tl.constexpr):
    """RMSNorm of a row, float32; with ADD of the row plus that of the residual, which becomes the sum."""
    values = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + columns, values.to(residual.dtype.element_ty), mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    return values * scale * tl.load(weight + columns, mask=inside, other=0.0)


@triton.jit
def gated(x, columns, inside, width):
    """silu(gates) * ups of a row whose gates come first, float32."""
    gate = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * tl.load(x + width + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rms_norm_kernel(x, x_stride, residual, residual_stride, weight, out, out_stride, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < width
    values = normed(x + row * x_stride, residual + row * residual_stride, weight, columns, inside, width, eps, ADD)
    tl.store(out + row * out_stride + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(x, x_stride, out, out_stride, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    tl.store(out + row * out_stride + columns, gated(x + row * x_stride, columns, inside, width).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(x, row_stride, head_stride, positions, cos_sin, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pairs = tl.arange(0, BLOCK)
    mask = pairs < HALF
    angles = cos_sin + tl.load(positions + row).to(tl.int64) * (2 * HALF) + pairs
    cos, sin = tl.load(angles, mask=mask, other=0.0), tl.load(angles + HALF, mask=mask, other=0.0)
    first = x + row * row_stride + head * head_stride + (2 * pairs if INTERLEAVED else pairs)
    second = first + (1 if INTERLEAVED else HALF)
    a, b = tl.load(first, mask=mask, other=0.0).to(tl.float32), tl.load(second, mask=mask, other=0.0).to(tl.float32)
    tl.store(first, (a * cos - b * sin).to(x.dtype.element_ty), mask=mask)
    tl.store(second, (b * cos + a * sin).to(x.dtype.element_ty), mask=mask)


@triton.jit
def route_kernel(
    logits, stride, ids, weights, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    mask = experts < EXPERTS
    values = tl.load(logits + row * stride + experts, mask=mask, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(values)
    else:
        masses = tl.exp(values - tl.max(values, axis=0))
        scores = masses / tl.sum(masses, axis=0)
    eligible = tl.where(mask, scores, -1.0)  # scores are never negative
    if GROUPS > 1:
        group = experts // (EXPERTS // GROUPS)
        open_groups = eligible
        kept = experts < 0
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.max(open_groups, axis=0)
            chosen = tl.min(tl.where(open_groups == best, group, BLOCK), axis=0)
            kept = kept | (group == chosen)
            open_groups = tl.where(group == chosen, -2.0, open_groups)
        eligible = tl.where(kept, eligible, -1.0)
    total = 0.0
    for k in tl.static_range(TOP_K):
        best = tl.max(eligible, axis=0)
        chosen = tl.minimum(tl.min(tl.where(eligible == best, experts, BLOCK), axis=0), EXPERTS - 1)  # NaN equals nothing
        tl.store(ids + row * TOP_K + k, chosen)
        tl.store(weights + row * TOP_K + k, best)
        total += best
        eligible = tl.where(experts == chosen, -2.0, eligible)
    factor = scale / total if RENORMALIZE else scale
    tl.debug_barrier()  # the weights just stored are read again, by other threads
    slots = tl.arange(0, BLOCK)
    place = weights + row * TOP_K + slots
    tl.store(place, tl.load(place, mask=slots < TOP_K, other=0.0) * factor, mask=slots < TOP_K)


def _rows(x: Tensor, width: int, out: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], width)) if out is None else out


def num_warps_for(width: int) -> int:
    return min(16, max(1, width // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    rows, width = x.shape
    out = _rows(x, width, out)
    block = triton.next_power_of_2(width)
    if rows:
        rms_norm_kernel[(rows,)](
            x, x.stride(0), x, 0, weight, out, out.stride(0), width, eps, ADD=False, BLOCK=block, num_warps=num_warps_for(block)
        )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    rows, width = x.shape
    out = _rows(x, width, out)
    block = triton.next_power_of_2(width)
    if rows:
        rms_norm_kernel[(rows,)](
            x, x.stride(0), residual, residual.stride(0), weight, out, out.stride(0), width, eps,
            ADD=True, BLOCK=block, num_warps=num_warps_for(block),
        )  # fmt: skip
    return out


def silu_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    rows, width = x.shape[0], x.shape[1] // 2
    out = _rows(x, width, out)
    block = min(1024, triton.next_power_of_2(width))
    if rows:
        silu_mul_kernel[(rows, triton.cdiv(width, block))](x, x.stride(0), out, out.stride(0), width, BLOCK=block)
    return out


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    rows, heads, dim = x.shape
    if rows:
        rotate_kernel[(rows, heads)](
            x, x.stride(0), x.stride(1), positions, cos_sin,
            HALF=dim // 2, INTERLEAVED=interleaved, BLOCK=triton.next_power_of_2(dim // 2), num_warps=1,
        )  # fmt: skip


def route(logits: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """Errors: Unsupported for a scoring without a kernel, InvalidParameter for groups that do not divide the experts."""
    if spec.scoring not in ("softmax", "sigmoid"):
        raise Unsupported(f"routers score by 'softmax' or 'sigmoid', not {spec.scoring!r}")
    if spec.num_experts % spec.num_groups or not 1 <= spec.top_groups <= spec.num_groups or not 1 <= spec.top_k <= spec.num_experts:
        raise InvalidParameter(
            f"{spec.top_k} of {spec.num_experts} experts in {spec.num_groups} groups of which {spec.top_groups} are chosen is no routing"
        )
    rows = logits.shape[0]
    ids = torch.empty((rows, spec.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((rows, spec.top_k), dtype=torch.float32, device=logits.device)
    if rows:
        route_kernel[(rows,)](
            logits, logits.stride(0), ids, weights, spec.scale,
            EXPERTS=spec.num_experts, TOP_K=spec.top_k, SIGMOID=spec.scoring == "sigmoid", RENORMALIZE=spec.renormalize,
            GROUPS=spec.num_groups, TOP_GROUPS=spec.top_groups, BLOCK=triton.next_power_of_2(spec.num_experts), num_warps=1,
        )  # fmt: skip
    return ids, weights
