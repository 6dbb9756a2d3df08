"""The one definition of how cached numbers lie in a KV block (core/kv_spec gives the byte counts).

`split_block` says where every element stands; reading applies it to the bytes of blocks, writing applies it to an index of
the elements, so the two cannot disagree.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from apportion.core.kv_spec import UNIT_BYTES, KVGroupSpec
from apportion.kernels.reference.number_formats import to_float8

TORCH_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
_BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # what indexing works on, whatever the bits mean
_PIECE = 64  # bytes; every layer of every block starts at a multiple of it


def split_block(elements: Tensor, group: KVGroupSpec) -> tuple[Tensor, Tensor]:
    """Elements of n blocks of one layer [n, layer_bytes / element_bytes] -> K [n, block_size, K, D] and V [n, block_size, K, Dv].

    A latent group gives the latent [n, block_size, 1, D] and its first Dv channels.
    """
    n, lanes, size, heads = elements.shape[0], group.format.lanes, group.block_size, group.num_kv_heads
    width = group.format.element_bytes
    if group.latent:
        latent = elements[:, : size * group.head_dim].reshape(n, 1, size // lanes, group.head_dim, lanes)
        latent = latent.permute(0, 2, 4, 1, 3).reshape(n, size, 1, group.head_dim)
        return latent, latent[..., : group.v_head_dim]
    rows = -(-group.head_dim // lanes)
    k_end, v_end = group.k_bytes // width, (group.k_bytes + group.v_bytes) // width
    k = elements[:, :k_end].reshape(n, heads, rows, size, lanes).permute(0, 3, 1, 2, 4).reshape(n, size, heads, rows * lanes)
    v = elements[:, k_end:v_end].reshape(n, heads, size // lanes, group.v_head_dim, lanes)
    return k[..., : group.head_dim], v.permute(0, 2, 4, 1, 3).reshape(n, size, heads, group.v_head_dim)


@lru_cache(maxsize=64)
def _element_index(group: KVGroupSpec) -> tuple[Tensor, Tensor]:
    """Where each element of a block's layer stands: for K [block_size, K, D] and V [block_size, K, Dv], counted in elements."""
    index = torch.arange(group.layer_bytes // group.format.element_bytes)[None]
    k, v = split_block(index, group)
    return k[0], v[0]


def read_blocks(
    arena: Tensor, group: KVGroupSpec, layer_offset: int, entries: Tensor, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks `entries` [n] of one layer, unpacked: K [n * block_size, K, D] and V [n * block_size, K, Dv], float32.

    scales: float32 [2, K], of keys and of values, where the format has such; None for 1.
    """
    pieces = arena.view(-1, _PIECE)
    first = entries.long() * (UNIT_BYTES // _PIECE) + layer_offset // _PIECE
    rows = first[:, None] + torch.arange(group.layer_bytes // _PIECE)
    stored = pieces.index_select(0, rows.flatten()).view(len(entries), group.layer_bytes).view(TORCH_DTYPES[group.format.name])
    k, v = split_block(stored, group)
    k, v = k.flatten(0, 1).float(), v.flatten(0, 1).float()
    return (k, v) if scales is None else (k * scales[0, :, None], v * scales[1, :, None])


def write_tokens(
    arena: Tensor, group: KVGroupSpec, layer_offset: int, entries: Tensor, slots: Tensor, k: Tensor, v: Tensor | None,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Store k [T, K, D] and v [T, K, Dv] (None for a latent group) of T tokens: token i at slot slots[i] of block entries[i].

    8-bit numbers are those nearest to x / scale, and at most the format's largest.
    """
    stored = arena.view(_BITS[group.format.element_bytes])
    base = (entries.long() * UNIT_BYTES + layer_offset) // group.format.element_bytes
    k_index, v_index = _element_index(group)
    for row, index, x in ((0, k_index, k), (1, v_index, v)):
        if x is not None:
            codes = _encode(x if scales is None else x / scales[row, :, None], group.format.name)
            stored[base[:, None, None] + index[slots]] = codes.view(stored.dtype)


def _encode(x: Tensor, name: str) -> Tensor:
    return to_float8(x, name.removeprefix("fp8_")) if name.startswith("fp8_") else x.to(TORCH_DTYPES[name])
