"""Dense attention, computed whole, and paged attention, computed in pieces through blocks, are one function."""

from __future__ import annotations

import pytest
import torch

from apportion.attention.backend import AttentionMetadata
from apportion.attention.dense import DenseBackend
from apportion.attention.paged import PagedBackend
from apportion.core.errors import InternalError
from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.kernels.ops import AttentionSpec
from apportion.kernels.reference.ops import ReferenceOps

LAYERS, BLOCK = (1, 4), 32


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 1, 13, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary", "norm"), [(4, 2, 16, 16, True), (7, 1, 8, 4, False), (2, 2, 80, 80, False)])
def test_dense_equals_paged(window, heads, kv_heads, dim, rotary, norm):
    group = KVGroupSpec(LAYERS, kv_heads, dim, dim, kv_format("float32"), BLOCK, window)
    spec = AttentionSpec(heads, group, dim**-0.5, rotary, qk_norm_eps=1e-6 if norm else None)
    generator = torch.Generator().manual_seed(0)
    cos_sin = torch.randn(64, rotary, generator=generator)
    norms = tuple(torch.randn(dim, generator=generator) for _ in range(2)) if norm else ()
    lens = (50, 33)
    qkv = torch.randn(sum(lens), (heads + 2 * kv_heads) * dim, generator=generator)
    positions = torch.cat([torch.arange(n) for n in lens]).int()

    dense = DenseBackend(ReferenceOps(), spec, cos_sin)
    empty = torch.empty(2, 0, dtype=torch.int32)
    metadata = dense.plan(AttentionMetadata(2, sum(lens), int32(0, 50, 83), int32(*lens), empty))
    expected = dense.run(4, qkv.clone(), positions, torch.empty(sum(lens), heads * dim), metadata, *norms)

    arena = torch.zeros(5 * group.block_bytes, dtype=torch.uint8)
    unit = group.block_bytes // 256
    table = int32(3 * unit, 0, 4 * unit, 1 * unit).view(2, 2)
    paged = PagedBackend(ReferenceOps(), spec, arena, cos_sin)
    actual = torch.empty_like(expected)
    done = [0, 0]
    for counts in ((20, 33), (29, 0), (1, 0)):
        rows = torch.cat([torch.arange(done[0], done[0] + counts[0]), 50 + torch.arange(done[1], done[1] + counts[1])])
        done = [d + c for d, c in zip(done, counts, strict=True)]
        live = 1 if counts[1] == 0 else 2
        starts = int32(0, counts[0], sum(counts))[: live + 1]
        metadata = paged.plan(AttentionMetadata(live, len(rows), starts, int32(*done)[:live], table[:live]))
        out = torch.empty(len(rows), heads * dim)
        actual[rows] = paged.run(4, qkv[rows], positions[rows], out, metadata, *norms)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_dense_keeps_no_context():
    group = KVGroupSpec((0,), 1, 8, 8, kv_format("float32"), BLOCK)
    dense = DenseBackend(ReferenceOps(), AttentionSpec(1, group, 1.0, 8), torch.zeros(4, 8))
    with pytest.raises(InternalError, match="must bring all its tokens"):
        dense.plan(AttentionMetadata(1, 1, int32(0, 1), int32(5), torch.empty(1, 0, dtype=torch.int32)))
