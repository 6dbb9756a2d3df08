"""The one definition of how cached numbers lie in a KV block (core/kv_spec gives the byte counts).

`split_block` says where every element stands; reading applies it to the bytes of blocks, writing applies it to an index of
the elements, so the two cannot disagree.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from apportion.core.kv_spec import UNIT_BYTES, KVGroupSpec

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


def read_blocks(arena: Tensor, group: KVGroupSpec, layer_offset: int, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks `entries` [n] of one layer, unpacked: K [n * block_size, K, D] and V [n * block_size, K, Dv], float32."""
    pieces = arena.view(-1, _PIECE)
    first = entries.long() * (UNIT_BYTES // _PIECE) + layer_offset // _PIECE
    rows = first[:, None] + torch.arange(group.layer_bytes // _PIECE)
    stored = pieces.index_select(0, rows.flatten()).view(len(entries), group.layer_bytes).view(TORCH_DTYPES[group.format.name])
    k, v = split_block(stored, group)
    return k.flatten(0, 1).float(), v.flatten(0, 1).float()


def write_tokens(arena: Tensor, group: KVGroupSpec, layer_offset: int, entries: Tensor, slots: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Store k [T, K, D] and v [T, K, Dv] (None for a latent group) of T tokens: token i at slot slots[i] of block entries[i]."""
    stored = arena.view(TORCH_DTYPES[group.format.name])
    base = (entries.long() * UNIT_BYTES + layer_offset) // group.format.element_bytes
    k_index, v_index = _element_index(group)
    stored[base[:, None, None] + k_index[slots]] = k.to(stored.dtype)
    if v is not None:
        stored[base[:, None, None] + v_index[slots]] = v.to(stored.dtype)
