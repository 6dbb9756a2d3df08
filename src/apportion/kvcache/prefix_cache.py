"""What a full block holds, as a key; and the longest prefix that all layer groups of a model still hold.

A key chains blake2b over (parent key, the block's tokens); the root is the model and format version, the adapter and the tenant, so
that nothing is ever shared between two of them. A key is published only when the step that fills its block has ended.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from math import lcm

from apportion.core.kv_spec import KVGroupSpec
from apportion.kvcache.block_pool import BlockPool

KEY_BYTES = 16


def root_key(version: str, adapter_id: int | None, tenant: str) -> bytes:
    """version: names the model and all that decides its KV bytes (weights, format, block layout)."""
    return blake2b(repr((version, adapter_id, tenant)).encode(), digest_size=KEY_BYTES).digest()


def extend_keys(keys: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_blocks: int) -> None:
    """Append to `keys` until it names the first `num_blocks` blocks of `token_ids`."""
    parent = keys[-1] if keys else root
    for index in range(len(keys), num_blocks):
        tokens = array("q", token_ids[index * block_size : (index + 1) * block_size])
        parent = blake2b(parent + tokens.tobytes(), digest_size=KEY_BYTES).digest()
        keys.append(parent)


def first_live_block(spec: KVGroupSpec, start: int) -> int:
    """Blocks before this one are seen by no query at position `start` or later: they lie wholly behind the window."""
    if spec.sliding_window is None:
        return 0
    return max(0, start - spec.sliding_window + 1) // spec.block_size


def longest_prefix(specs: Sequence[KVGroupSpec], pools: Sequence[BlockPool], keys: dict[int, list[bytes]], max_tokens: int) -> int:
    """The most tokens, at most `max_tokens`, after which every group could go on computing from its published blocks.

    keys: per block size, as many as `max_tokens` has full blocks. A full-attention group needs every block of the prefix, a window
    group those that the next query sees.
    """
    step = lcm(*(spec.block_size for spec in specs))
    found = max_tokens // step * step
    lowered = True
    while lowered and found:
        lowered = False
        for spec, pool in zip(specs, pools, strict=True):
            served = _served_by(spec, pool, keys[spec.block_size], found, step)
            if served < found:
                found, lowered = served, True
    return found


def _served_by(spec: KVGroupSpec, pool: BlockPool, keys: list[bytes], limit: int, step: int) -> int:
    """The largest multiple of `step`, at most `limit`, that this group alone can serve."""
    size = spec.block_size
    if spec.sliding_window is None:
        run = 0
        while run < limit // size and pool.find(keys[run]) is not None:
            run += 1
        return run * size // step * step
    end = limit // size
    index = end
    while index > first_live_block(spec, end * size):
        index -= 1
        if pool.find(keys[index]) is None:  # this prefix is out, and so is every longer one that needs the block
            end = index * size // step * step // size
            index = end
    return end * size
