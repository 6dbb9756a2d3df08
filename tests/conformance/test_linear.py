"""Linears and experts of every implementation against the reference."""

import pytest
import torch

from apportion.kernels.ops import ExpertsSpec, LinearSpec

SHAPES = [(1, 1), (32, 32), (33, 47), (96, 128), (257, 80), (64, 1056)]
ROWS = (1, 2, 3, 4, 7, 16, 17, 33, 64)
MAX_ROWS = 300


def buffer(nbytes):
    """256-byte aligned, filled with bytes that are NaN in every dtype."""
    raw = torch.full((nbytes + 256,), 0xFF, dtype=torch.uint8)
    start = -raw.data_ptr() % 256
    return raw[start : start + nbytes]


def linear(ops, n, c, dtype, bias=False, pieces=1, gated=False):
    generator = torch.Generator().manual_seed(n * 1000 + c)
    op = ops.linear(LinearSpec(n, c, dtype, bias, gated))
    op.bind(buffer(op.nbytes))
    weight = torch.randn(n, c, generator=generator).to(getattr(torch, dtype))
    for part, row in zip(weight.split(-(-n // pieces)), range(0, n, -(-n // pieces)), strict=True):
        op.load_rows(part, row)
    if bias:
        for part, row in zip(torch.randn(n, generator=generator).split(-(-n // pieces)), range(0, n, -(-n // pieces)), strict=True):
            op.load_bias(part, row)
    return op, weight.float()


def seen_by(capability, x, dtype):
    """x as the multiplication takes it: rounded where that is declared."""
    if dtype not in capability.rounds_activations:
        return x
    return x.to(torch.float16 if dtype == "float16" else torch.bfloat16).float()


@pytest.mark.parametrize("n, c", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(make_ops, reference, capability, weight_dtype, n, c, bias, thin):
    op, weight = linear(make_ops("linear"), n, c, weight_dtype, bias)
    oracle, _ = linear(reference, n, c, weight_dtype, bias)
    for rows in thin(ROWS):
        x = torch.randn(rows, c)
        y, seen = op(x), seen_by(capability, x, weight_dtype)
        bound = 4e-7 * max(4, c**0.5) * (seen.abs() @ weight.abs().T + 1)  # rounding errors of a float32 sum, walked at random
        assert y.shape == (rows, n) and y.dtype == torch.float32
        assert ((y - oracle(seen)).abs() <= bound).all(), f"T={rows}"


@pytest.mark.parametrize("f, c", [(1, 8), (47, 33), (64, 96), (129, 1056)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_linear(make_ops, reference, capability, weight_dtype, f, c, bias, thin):
    op, weight = linear(make_ops("linear"), 2 * f, c, weight_dtype, bias, pieces=1 if f == 1 else 3, gated=True)
    oracle, _ = linear(reference, 2 * f, c, weight_dtype, bias, gated=True)
    for rows in thin((*thin(ROWS), 290, 600)):
        x = torch.randn(rows, c) / c**0.5
        y, seen = op(x), seen_by(capability, x, weight_dtype)
        bound = 4e-7 * max(4, c**0.5) * (seen.abs() @ weight.abs().T + 1)
        gate, up = (seen.abs() @ weight.abs().T + 3).chunk(2, dim=-1)  # with the largest bias; |silu(a)'| <= 1.1
        assert y.shape == (rows, f) and y.dtype == torch.float32
        assert ((y - oracle(seen)).abs() <= 1.1 * (bound[:, :f] * up + bound[:, f:] * gate) + 1e-6).all(), f"T={rows}"


def test_linear_loads_in_pieces_from_any_float_dtype(make_ops, weight_dtype):
    ops = make_ops("linear")
    whole, weight = linear(ops, 100, 48, weight_dtype)
    pieces, _ = linear(ops, 100, 48, weight_dtype, pieces=3)
    wide = ops.linear(LinearSpec(100, 48, weight_dtype))
    wide.bind(buffer(wide.nbytes))
    wide.load_rows(weight.double(), 0)
    x = torch.randn(5, 48)
    assert torch.equal(whole(x), pieces(x)) and torch.equal(whole(x), wide(x))


def test_linear_binds_packed_bytes(make_ops, weight_dtype):
    ops = make_ops("linear")
    first = ops.linear(LinearSpec(40, 24, weight_dtype, True))
    packed = buffer(first.nbytes)
    first.bind(packed)
    first.load_rows(torch.randn(40, 24), 0)
    first.load_bias(torch.randn(40), 0)
    second = ops.linear(LinearSpec(40, 24, weight_dtype, True))
    second.bind(packed.clone() if packed.data_ptr() % 256 == packed.clone().data_ptr() % 256 else packed)
    x = torch.randn(3, 24)
    assert torch.equal(first(x), second(x))


def test_linear_takes_strided_rows_and_an_output(make_ops, weight_dtype):
    op, _ = linear(make_ops("linear"), 33, 48, weight_dtype, True)
    wide, out = torch.randn(9, 80), torch.full((9, 40), 7.0)
    x = wide[:, 3:51]
    op(x, out[:, 2:35])
    assert torch.equal(out[:, 2:35], op(x.contiguous()))
    assert (out[:, :2] == 7).all() and (out[:, 35:] == 7).all()


def test_linear_rows_are_the_weight(make_ops, weight_dtype):
    op, weight = linear(make_ops("linear"), 70, 50, weight_dtype)
    ids = torch.tensor([69, 0, 33, 33, 7], dtype=torch.int32)
    assert torch.equal(op.rows(ids), weight[ids.long()])


@pytest.mark.parametrize("n, c", [(33, 47), (257, 80), (64, 1056)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_linear_rows_do_not_see_each_other(make_ops, batch_invariant, weight_dtype, n, c, gated):
    n *= 1 + gated
    x = torch.randn(MAX_ROWS, c)
    op, _ = linear(make_ops("linear"), n, c, weight_dtype, True, gated=gated)
    two, _ = linear(make_ops("linear", 2), n, c, weight_dtype, True, gated=gated)
    whole = op(x)
    assert torch.equal(whole, two(x)), "one and two threads differ"
    for row in (0, 13, 280, MAX_ROWS - 1):
        assert torch.equal(op(x[row : row + 1])[0], whole[row]), f"row {row} alone"
    for rows in ROWS:
        assert torch.equal(op(x[5 : 5 + rows]), whole[5 : 5 + rows]), f"T={rows}"
        assert torch.equal(two(x[5 : 5 + rows]), whole[5 : 5 + rows]), f"T={rows}, two threads"


def experts(ops, num, hidden, ffn, dtype):
    generator = torch.Generator().manual_seed(num)
    op = ops.experts(ExpertsSpec(num, hidden, ffn, ((dtype,) * 3,)))
    op.bind(buffer(op.nbytes))
    for expert in range(num):
        for projection, n, c in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            weight = torch.randn(n, c, generator=generator) * c**-0.5
            op.load(expert, projection, weight[: n // 2], 0)
            op.load(expert, projection, weight[n // 2 :], n // 2)
    return op


def routed(rows, num, top_k, missing=0.0):
    ids = torch.rand(rows, num).argsort(1)[:, :top_k].int()
    return ids.masked_fill(torch.rand(rows, top_k) < missing, -1), torch.rand(rows, top_k)


@pytest.mark.parametrize("hidden, ffn", [(32, 32), (48, 40), (33, 65)], ids=str)
@pytest.mark.parametrize("num, top_k", [(4, 1), (8, 3), (5, 5)], ids=str)
def test_experts(make_ops, reference, capability, weight_dtype, hidden, ffn, num, top_k, thin):
    op, oracle = experts(make_ops("experts"), num, hidden, ffn, weight_dtype), experts(reference, num, hidden, ffn, weight_dtype)
    tolerance = {"bfloat16": 2e-2, "float16": 3e-3}.get(weight_dtype, 0) if weight_dtype in capability.rounds_activations else 1e-5
    for rows in thin(thin((9, 1, 2, 40))):
        for missing in thin((0.5, 0.0, 1.0)):
            x, (ids, weights) = torch.randn(rows, hidden), routed(rows, num, top_k, missing)
            y, expected = op(x, ids, weights), oracle(seen_by(capability, x, weight_dtype), ids, weights)
            assert (y - expected).abs().max() <= tolerance * max(1.0, expected.abs().max()), f"T={rows}"


def test_experts_rows_do_not_see_each_other(make_ops, batch_invariant, weight_dtype):
    op, two = (experts(make_ops("experts", threads), 6, 48, 40, weight_dtype) for threads in (1, 2))
    x, (ids, weights) = torch.randn(50, 48), routed(50, 6, 2)
    whole = op(x, ids, weights)
    assert torch.equal(two(x, ids, weights), whole)
    for first, last in ((0, 1), (49, 50), (3, 5), (10, 27), (0, 40)):
        assert torch.equal(op(x[first:last], ids[first:last], weights[first:last]), whole[first:last])
