"""Norms, gating, rotation, routing, sampling and log-probabilities of every implementation against the reference."""

import pytest
import torch

from apportion.core.errors import InternalError
from apportion.kernels.ops import RouteSpec, SamplingRows

SIZES = [(1, 1), (3, 8), (5, 47), (33, 256), (2, 1000)]


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows, width", SIZES, ids=str)
def test_rms_norm(make_ops, reference, rows, width):
    ops, weight = make_ops("rms_norm"), torch.rand(width) + 0.5
    x = (torch.randn(rows, width + 5) * 3)[:, 2 : width + 2]
    close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    out = torch.empty(rows, width)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6, out), out)
    close(out, reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("rows, width", SIZES, ids=str)
def test_add_rms_norm(make_ops, reference, rows, width):
    ops, weight = make_ops("add_rms_norm"), torch.rand(width) + 0.5
    x, residual = torch.randn(rows, width), torch.randn(rows, width)
    mine, theirs = residual.clone(), residual.clone()
    close(ops.add_rms_norm(x, mine, weight, 1e-5), reference.add_rms_norm(x, theirs, weight, 1e-5))
    assert torch.equal(mine, theirs)
    out = torch.empty(rows, width)
    ops.add_rms_norm(x, residual, weight, 1e-5, out)
    close(out, reference.rms_norm(theirs, weight, 1e-5))


@pytest.mark.parametrize("rows, width", SIZES, ids=str)
def test_silu_mul(make_ops, reference, rows, width):
    ops, x = make_ops("silu_mul"), torch.randn(rows, 2 * width) * 5
    x[0, 0] = -100.0  # exp overflows where it is written carelessly
    close(ops.silu_mul(x), reference.silu_mul(x))
    out = torch.empty(rows, width)
    ops.silu_mul(x, out)
    close(out, reference.silu_mul(x))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads, dim, width", [(1, 8, 8), (3, 64, 64), (2, 10, 24)], ids=str)
def test_rotate(make_ops, reference, interleaved, heads, dim, width):
    ops, cos_sin = make_ops("rotate"), torch.randn(50, dim)
    x = torch.randn(7, heads, width)
    expected, positions = x.clone(), torch.randint(0, 50, (7,)).int()
    ops.rotate(x[..., width - dim :], positions, cos_sin, interleaved)
    reference.rotate(expected[..., width - dim :], positions, cos_sin, interleaved)
    close(x, expected)


ROUTES = [
    RouteSpec(8, 2),
    RouteSpec(60, 4, renormalize=False),
    RouteSpec(1, 1, scoring="sigmoid", renormalize=False),  # a plain gate
    RouteSpec(16, 16, scoring="sigmoid"),
    RouteSpec(32, 6, renormalize=False, num_groups=8, top_groups=3, scale=16.0),
    RouteSpec(12, 2, scoring="sigmoid", num_groups=3, top_groups=1),
]


@pytest.mark.parametrize("spec", ROUTES, ids=lambda s: f"{s.num_experts}-{s.top_k}-{s.scoring}-{s.num_groups}")
def test_route(make_ops, reference, spec):
    ops, logits = make_ops("route"), torch.randn(40, spec.num_experts)
    logits[0] = 0.0  # all tie
    logits[1] = logits[1].round()  # some do
    ids, weights = ops.route(logits, spec)
    expected_ids, expected_weights = reference.route(logits, spec)
    assert ids.dtype == torch.int32 and torch.equal(ids, expected_ids)
    close(weights, expected_weights)


@pytest.mark.parametrize("op, width", [("rms_norm", 300), ("add_rms_norm", 300), ("silu_mul", 300), ("route", 16), ("route", 1)])
def test_rows_do_not_see_each_other(make_ops, batch_invariant, op, width):
    one, two = make_ops(op, 1), make_ops(op, 2)
    x, weight = torch.randn(40, width), torch.rand(width)

    def call(ops, rows):
        if op == "rms_norm":
            return ops.rms_norm(rows, weight, 1e-6)
        if op == "add_rms_norm":
            return ops.add_rms_norm(rows, rows.clone(), weight, 1e-6)
        return (
            ops.silu_mul(rows)
            if op == "silu_mul"
            else ops.route(rows, RouteSpec(width, min(width, 3), "sigmoid", renormalize=width > 1))[1]
        )

    whole = call(one, x).clone()
    assert torch.equal(call(two, x), whole)
    for row in (0, 17, 39):
        assert torch.equal(call(one, x[row : row + 1])[0], whole[row])


def sampling_rows(n, **fields):
    choices = torch.Generator().manual_seed(4)
    pick = lambda values: torch.tensor(values)[torch.randint(0, len(values), (n,), generator=choices)]  # noqa: E731
    rows = SamplingRows(
        temperature=pick([0.0, 0.5, 1.0, 2.0]),
        top_k=pick([0, 1, 5, 100]).int(),
        top_p=pick([1.0, 0.9, 0.3]),
        min_p=pick([0.0, 0.05, 0.5]),
        seed=torch.randint(-(2**62), 2**62, (n,), generator=choices),
        position=torch.randint(0, 2**40, (n,), generator=choices),
    )
    for name, value in fields.items():
        setattr(rows, name, torch.full((n,), value, dtype=getattr(rows, name).dtype))
    return rows


@pytest.mark.parametrize("vocab", [1, 7, 1000, 32003])
def test_sample(make_ops, reference, vocab, thin):
    ops, logits = make_ops("sample"), thin(thin(thin(torch.randn(200 if vocab < 5000 else 40, vocab) * 3)))
    rows = sampling_rows(len(logits))
    got, expected = ops.sample(logits, rows), reference.sample(logits, rows)
    assert got.dtype == torch.int32
    assert (got != expected).sum() <= len(logits) // 200  # a draw may fall between the roundings of two exponentials


@pytest.mark.parametrize("vocab", [1, 7, 50, 1000, 128_256])
def test_apply_bitmask(make_ops, reference, vocab):
    ops, num_bytes = make_ops("apply_bitmask"), (vocab + 7) // 8
    masks = torch.randint(0, 256, (3, num_bytes + 4), dtype=torch.uint8)
    masks[1, : num_bytes // 2], masks[2, num_bytes // 2 :] = 0, 255
    logits, rows = torch.randn(5, vocab + 3)[:, 1 : vocab + 1], torch.tensor([4, 0, 2], dtype=torch.int32)
    mine, theirs = logits.clone(), logits.clone()
    ops.apply_bitmask(mine, rows, masks)
    reference.apply_bitmask(theirs, rows, masks)
    assert torch.equal(mine, theirs) and torch.equal(mine[[1, 3]], logits[[1, 3]])
    allowed = [[bool(masks[g, t // 8] >> (t % 8) & 1) for t in range(vocab)] for g in range(3)] if vocab < 5000 else None
    assert allowed is None or mine[rows.long()].isfinite().tolist() == allowed
    with pytest.raises(InternalError, match="does not cover a vocabulary"):
        ops.apply_bitmask(torch.zeros(1, 8 * masks.shape[1] + 1), rows[1:2], masks[:1])


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0}], ids=str)
def test_sample_breaks_ties_to_the_lower_id(make_ops, reference, fields, thin):
    ops, logits = make_ops("sample"), thin(thin(torch.randint(0, 4, (100, 50)).float()))
    rows = sampling_rows(len(logits), **fields)
    assert torch.equal(ops.sample(logits, rows), reference.sample(logits, rows))


def test_sample_marks_rows_that_are_not_numbers(make_ops, reference):
    ops, logits = make_ops("sample"), torch.randn(8, 100)
    logits[0, 5], logits[1, 99], logits[2, 3], logits[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    logits[4, 1:] = -torch.inf
    for temperature in (0.0, 1.0):
        rows = sampling_rows(8, temperature=temperature)
        got = ops.sample(logits, rows)
        assert got[:5].tolist() == [-1, -1, -1, -1, 0]
        assert torch.equal(got, reference.sample(logits, rows))


@pytest.mark.parametrize("vocab, top_n", [(5, 5), (1000, 0), (1000, 7), (32003, 20)], ids=str)
def test_logprobs(make_ops, reference, vocab, top_n):
    ops, logits = make_ops("logprobs"), (torch.randn(9, vocab) * 3).round(decimals=1)  # ties
    ids = torch.randint(0, vocab, (9,)).int()
    got, expected = ops.logprobs(logits, ids, top_n), reference.logprobs(logits, ids, top_n)
    close(got[0], expected[0])
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])
    close(got[3], expected[3])
