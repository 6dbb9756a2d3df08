"""Paged and latent attention of csrc/cpu/attention*. Shapes are checked when an object is made; a call passes addresses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from apportion.core.errors import InternalError, Unsupported
from apportion.kernels.cpu import extension
from apportion.kernels.ops import AttentionSpec


def _bind(team: Any, spec: AttentionSpec, arena: Tensor) -> Any:
    kv, module = spec.kv, extension.load()
    span = module.attention_limits()["span"]
    if kv.block_size % span:
        raise Unsupported(f"CPU attention takes block sizes that are multiples of {span} tokens, got {kv.block_size}")
    if not kv.latent and kv.head_dim % kv.format.lanes:
        raise Unsupported(f"CPU attention in {kv.format.name} takes a head_dim that is a multiple of {kv.format.lanes}, got {kv.head_dim}")
    if spec.num_heads % kv.num_kv_heads:
        raise Unsupported(f"{spec.num_heads} query heads cannot share {kv.num_kv_heads} kv heads evenly")
    if spec.rotary_dim % 2 or spec.rotary_dim > kv.head_dim:
        raise Unsupported(f"rotary_dim must be even and at most head_dim ({kv.head_dim}), got {spec.rotary_dim}")
    if arena.dtype != torch.uint8 or not arena.is_contiguous() or arena.data_ptr() % 64:
        raise Unsupported("the KV arena must be contiguous uint8 and aligned to 64 bytes")
    return module.PagedAttention(
        team,
        arena=arena.data_ptr(),
        format=kv.format.name,
        num_heads=spec.num_heads,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        v_head_dim=kv.v_head_dim,
        block_size=kv.block_size,
        window=kv.sliding_window or 0,
        latent=kv.latent,
        scale=spec.scale,
        rotary_dim=spec.rotary_dim,
        interleaved=spec.interleaved,
        qk_norm_eps=spec.qk_norm_eps or 0.0,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Planned:
    generation = 0

    def __init__(self, team: Any, spec: AttentionSpec, arena: Tensor) -> None:
        self.spec = spec
        self._arena = arena  # kept alive: the kernel holds its address
        self._kernel = _bind(team, spec, arena)
        self._phi: dict[int, Tensor] = {}

    @property
    def recomputed(self) -> int:
        return int(self._kernel.recomputed)

    def unify(self, layer_offset: int, phi_H: Tensor | None) -> None:
        """phi float32 [H] in base 2, NaN where a head stays online; None: all do."""
        if phi_H is None:
            self._phi.pop(layer_offset, None)
            return
        if phi_H.shape != (self.spec.num_heads,):
            raise InternalError(f"unified maxima of shape {tuple(phi_H.shape)} were given for {self.spec.num_heads} heads")
        self._phi[layer_offset] = (phi_H.double() / (self.spec.scale * math.log2(math.e))).float().contiguous()

    def _run(self, layer_offset: int, q: Tensor, out: Tensor, handle: Any, scales: Tensor | None) -> Tensor:
        phi = _address(self._phi.get(layer_offset))
        self._kernel.run(handle, layer_offset, q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0), _address(scales), phi)
        return out

    def plan(
        self, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, num_requests: int, num_tokens: int, handle: Any = None
    ) -> Any:
        if handle is None:
            handle = extension.load().AttentionPlan()
        self._kernel.plan(
            handle, query_start_loc.data_ptr(), seq_lens.data_ptr(), block_table.data_ptr(), block_table.stride(0), num_requests
        )
        return handle


class PagedAttention(_Planned):
    """kernels/ops.PagedAttention, for any ratio of heads and any window; a request's bits depend on neither batch nor chunking."""

    def write(
        self,
        layer_offset: int,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        handle: Any,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        self._kernel.write(
            handle,
            layer_offset,
            qkv.data_ptr(),
            qkv.stride(0),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            _address(q_norm),
            _address(k_norm),
            _address(scales),
        )

    def run(self, layer_offset: int, qkv: Tensor, out: Tensor, handle: Any, scales: Tensor | None = None) -> Tensor:
        return self._run(layer_offset, qkv, out, handle, scales)


class LatentAttention(_Planned):
    """kernels/ops.LatentAttention."""

    def write(self, layer_offset: int, latent: Tensor, handle: Any, scales: Tensor | None = None) -> None:
        self._kernel.write(handle, layer_offset, latent.data_ptr(), latent.stride(0), 0, 0, 0, 0, _address(scales))

    def run(self, layer_offset: int, q: Tensor, out: Tensor, handle: Any, scales: Tensor | None = None) -> Tensor:
        return self._run(layer_offset, q, out, handle, scales)


class Rotary:
    """kernels/ops.Ops.rotate."""

    def __init__(self, team: Any) -> None:
        self._kernel = extension.load().Rotary(team)

    def rotate(self, x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
        """x [T, heads, rotary_dim] in place, rows and heads may be strided."""
        rows, heads, rotary_dim = x.shape
        self._kernel.rotate(
            x.data_ptr(), x.stride(0), x.stride(1), rows, heads, rotary_dim, positions.data_ptr(), cos_sin.data_ptr(), interleaved
        )
