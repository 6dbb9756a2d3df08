"""FlashDecoding++ (arXiv:2311.01282, section 3): softmax under a fixed maximum is exact where scores stay in range, and where they do not
the rows, and only those, are computed again inside the same call."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.kernels.ops import AttentionSpec
from apportion.kernels.reference.attention import ReferencePagedAttention
from apportion.kernels.reference.formats import TORCH_DTYPES, read_blocks

pytestmark = pytest.mark.skipif(not find_spec("triton") or torch.cuda.is_available(), reason="needs Triton and its interpreter")
HEADS, LENS, SCALE = 4, (300, 1, 40), 0.25
GROUP = KVGroupSpec((0,), 2, 16, 16, kv_format("float32"), 32)


def in_float64(attention, qkv):
    """Every request by itself, over what its blocks hold."""
    rows = []
    for row, length in enumerate(LENS):
        entries = attention.table[row, : -(-length // 32)]
        k, v = (x[:length].double() for x in read_blocks(attention.arena, GROUP, 0, entries))
        q = qkv[row, : HEADS * 16].double().view(2, 2, 16)
        scores = torch.einsum("kgd,skd->kgs", q, k) * SCALE
        rows.append(torch.einsum("kgs,skd->kgd", scores.softmax(-1), v).flatten())
    return torch.stack(rows)


def make_step(group):
    """(triton's attention, its plan, queries [3, C], what the reference makes of a qkv)"""
    from apportion.kernels.triton.ops import TritonOps

    blocks = [-(-n // 32) for n in LENS]
    table = torch.full((3, max(blocks)), -1, dtype=torch.int32)
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).int() * (group.block_bytes // 256)
    for row, (first, count) in enumerate(zip((0, blocks[0], blocks[0] + blocks[1]), blocks, strict=True)):
        table[row, :count] = order[first : first + count]
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(sum(blocks) * group.block_bytes // group.format.element_bytes, generator=generator)
    arena = numbers.to(TORCH_DTYPES[group.format.name]).view(torch.uint8)
    qkv = torch.randn(3, 8 * 16, generator=generator)
    inputs = torch.arange(4).int(), torch.tensor(LENS).int(), table, 3, 3
    spec = AttentionSpec(HEADS, group, SCALE, 16)
    attention = TritonOps(True, torch.device("cpu"), 1 << 20).paged_attention(spec, arena)
    attention.table, attention.arena = table, arena
    oracle = ReferencePagedAttention(spec, arena)
    return attention, attention.plan(*inputs), qkv, lambda x: oracle.run(0, x, torch.empty(3, HEADS * 16), oracle.plan(*inputs))


@pytest.fixture(scope="module")
def step():
    return make_step(GROUP)


@pytest.mark.parametrize(
    ("phi", "gain", "recomputed"),
    [
        ([0.0] * HEADS, 1.0, 0),
        ([3.0, -2.0, 5.0, 0.0], 1.0, 0),
        ([200.0] * HEADS, 1.0, 3 * HEADS),  # every sum underflows
        ([-200.0] * HEADS, 1.0, 3 * HEADS),  # every score is too high
        ([0.0, -200.0, 0.0, 200.0], 1.0, 6),  # two heads of each request
        ([0.0] * HEADS, 1e4, None),  # logits of thousands: all where one key stands out
    ],
)
def test_rows_out_of_range_are_computed_again(step, phi, gain, recomputed):
    attention, plan, qkv, oracle = step
    x = qkv.clone()
    x[:, : HEADS * 16] *= gain
    attention.unify(0, torch.tensor(phi))
    attention.recomputed.zero_()
    out = attention.run(0, x, torch.full((3, HEADS * 16), torch.nan), plan)
    torch.testing.assert_close(out, oracle(x), rtol=2e-5, atol=2e-5)
    count = int(attention.recomputed)
    assert count == recomputed if recomputed is not None else count > 0


@pytest.mark.parametrize(("phi", "recomputed"), [(1.0, 0), (200.0, 8 * HEADS), (-200.0, 8 * HEADS)])
def test_prefill_likewise(phi, recomputed):
    """A chunk of 5 tokens behind 295 others, a decode step, and a prompt of 2 with context: in one call."""
    attention, _, _, _ = make_step(GROUP)
    qkv = torch.randn(8, 8 * 16, generator=torch.Generator().manual_seed(5))
    inputs = torch.tensor([0, 5, 6, 8], dtype=torch.int32), torch.tensor(LENS).int(), attention.table, 3, 8
    oracle = ReferencePagedAttention(attention.spec, attention.arena)
    expected = oracle.run(0, qkv, torch.empty(8, HEADS * 16), oracle.plan(*inputs))
    attention.unify(0, torch.full((HEADS,), phi))
    out = attention.run(0, qkv, torch.full((8, HEADS * 16), torch.nan), attention.plan(*inputs))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    assert int(attention.recomputed) == recomputed


@pytest.mark.parametrize(
    ("kv", "phi", "recomputed"),
    [
        ("fp8_e4m3", 50.0, False),
        ("fp8_e4m3", 90.0, True),
        ("bfloat16", -60.0, False),
        ("float16", 2.0, False),
        ("float16", -20.0, True),  # probabilities up to 2^20: float16 ends at 2^16
        ("float16", 20.0, True),  # down to 2^-20, where it has a few bits
    ],
)
def test_each_format_has_its_range(kv, phi, recomputed):
    attention, plan, qkv, oracle = make_step(replace(GROUP, format=kv_format(kv)))
    attention.unify(0, torch.full((HEADS,), phi))
    out = attention.run(0, qkv, torch.full((3, HEADS * 16), torch.nan), plan)
    torch.testing.assert_close(out, oracle(qkv), rtol=2e-2, atol=2e-2)
    assert int(attention.recomputed) == (3 * HEADS if recomputed else 0)


def test_the_error_is_that_of_the_online_softmax(step):
    """Against float64, within a rounding of the sum."""
    attention, plan, qkv, _ = step
    exact, errors = in_float64(attention, qkv), []
    for phi in (None, torch.full((HEADS,), 2.0)):
        attention.unify(0, phi)
        errors.append((attention.run(0, qkv, torch.empty(3, HEADS * 16), plan).double() - exact).abs().max())
    assert errors[1] <= errors[0] + 2**-22
