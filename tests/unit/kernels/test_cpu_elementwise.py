"""Row-wise CPU operators: every instruction set of this machine against the reference, and the bitwise promise."""

import pytest
import torch

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.kernels.cpu import extension
from apportion.kernels.ops import RouteSpec
from apportion.kernels.reference import elementwise as reference

if not extension.available():
    pytest.skip(f"{extension.ABSENT}", allow_module_level=True)

from apportion.kernels.cpu.ops import CpuOps

CPU = extension.load()
SETS = [name for name, state in CPU.features()["sets"].items() if state["available"]]
TEAM, ALONE = CPU.ThreadTeam(2), CPU.ThreadTeam(1)
ROUTES = [
    RouteSpec(8, 2),
    RouteSpec(60, 4, renormalize=False),
    RouteSpec(32, 4, scale=2.5),
    RouteSpec(160, 6, renormalize=False, num_groups=8, top_groups=3, scale=16.0),
    RouteSpec(64, 8, "sigmoid", num_groups=4, top_groups=2),
    RouteSpec(5, 5, "sigmoid"),
]


@pytest.fixture(params=SETS)
def ops(request):
    yield CpuOps(TEAM, request.param)
    CPU.select_isa("")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("width", [1, 7, 64, 80, 172, 1024, 2816])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_rms_norm(ops, rows, width):
    x, weight = torch.randn(rows, width + 5)[:, 2 : width + 2], torch.randn(width)
    close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    out = torch.full((rows, width + 3), -1.0)
    ops.rms_norm(x, weight, 1e-5, out[:, :width])
    assert torch.equal(out[:, :width], ops.rms_norm(x, weight, 1e-5)) and (out[:, width:] == -1).all()
    residual = torch.randn(rows, width)
    expected = residual + x
    got = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected)
    assert torch.equal(got, ops.rms_norm(expected, weight, 1e-5))


@pytest.mark.parametrize("width", [1, 7, 64, 384, 2816])
def test_silu_mul(ops, width):
    x = torch.randn(9, 2 * width + 3)[:, : 2 * width] * 8
    close(ops.silu_mul(x), reference.silu_mul(x))
    extreme = torch.tensor([[-1000.0, 1000.0, -88.0, float("nan"), 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(ops.silu_mul(extreme), reference.silu_mul(extreme), equal_nan=True)


@pytest.mark.parametrize("spec", ROUTES, ids=str)
def test_route(ops, spec):
    logits = torch.randn(300, spec.num_experts)
    logits[7] = logits[7].round()  # ties go to the lower id
    logits[8] = 0
    ids, weights = ops.route(logits, spec)
    expected_ids, expected_weights = reference.route(logits, spec)
    assert torch.equal(ids, expected_ids) and ids.dtype == torch.int32
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-6)
    alone = CpuOps(ALONE, ops.isa)
    assert all(torch.equal(a, b) for a, b in zip(alone.route(logits, spec), (ids, weights), strict=True))


def test_route_with_nan_stays_in_range(ops):
    logits = torch.full((2, 8), float("nan"))
    logits[1, 3] = 1
    ids, weights = ops.route(logits, RouteSpec(8, 3))
    assert ids.min() >= 0 and ids.max() < 8 and all(len(set(row)) == 3 for row in ids.tolist())
    assert weights.isnan().all()


def test_a_row_does_not_depend_on_the_others(ops):
    alone = CpuOps(ALONE, ops.isa)
    x, weight = torch.randn(700, 1000), torch.randn(1000)
    for whole, row in (
        (ops.rms_norm(x, weight, 1e-6), lambda i: alone.rms_norm(x[i : i + 1], weight, 1e-6)),
        (ops.silu_mul(x), lambda i: alone.silu_mul(x[i : i + 1])),
        (ops.route(x, RouteSpec(1000, 8))[1], lambda i: alone.route(x[i : i + 1], RouteSpec(1000, 8))[1]),
    ):
        assert all(torch.equal(whole[i : i + 1], row(i)) for i in range(0, 700, 13))


def test_bad_routes_are_named():
    ops = CpuOps(TEAM)
    for spec, error, word in (
        (RouteSpec(8, 9), InvalidParameter, "top_k is 9"),
        (RouteSpec(8, 2, "argmax"), Unsupported, "argmax"),
        (RouteSpec(8, 2, num_groups=3), InvalidParameter, "3 groups"),
    ):
        with pytest.raises(error, match=word):
            ops.route(torch.zeros(1, 8), spec)
