"""Grouped experts: every instruction set of this machine against the reference, and the bitwise promise."""

import pytest
import torch

from apportion.core.errors import InternalError, InvalidParameter, Unsupported
from apportion.kernels.cpu import ROUNDS_ACTIVATIONS, extension
from apportion.kernels.ops import ExpertsSpec
from apportion.kernels.reference.ops import ReferenceOps

if not extension.available():
    pytest.skip(f"{extension.ABSENT}", allow_module_level=True)

from apportion.kernels.cpu.experts import PackedExperts
from apportion.kernels.cpu.ops import CpuOps

CPU = extension.load()
SETS = [name for name, state in CPU.features()["sets"].items() if state["available"]]
TEAM, ALONE = CPU.ThreadTeam(2), CPU.ThreadTeam(1)
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(params=SETS)
def ops(request):
    yield CpuOps(TEAM, request.param)
    CPU.select_isa("")


def filled(experts, seed=0):
    spec = experts.spec
    experts.bind(torch.full((experts.nbytes,), 0xFF, dtype=torch.uint8))
    generator = torch.Generator().manual_seed(seed)
    for expert in range(spec.num_experts):
        for projection, rows, columns in (("gate", spec.ffn, spec.hidden), ("up", spec.ffn, spec.hidden), ("down", spec.hidden, spec.ffn)):
            weight = torch.randn(rows, columns, generator=generator) / columns**0.5
            experts.load(expert, projection, weight[: rows // 2])
            experts.load(expert, projection, weight[rows // 2 :], rows // 2)
    return experts


def choices(rows, top_k, num_experts):
    ids = torch.rand(rows, num_experts).argsort(dim=1)[:, :top_k].int()
    ids[torch.rand(rows, top_k) < 0.1] = -1
    return ids, torch.rand(rows, top_k)


@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [("bfloat16", "float32", "float16", "bfloat16", "bfloat16")], ids="-".join)
@pytest.mark.parametrize(("hidden", "ffn"), [(64, 96), (80, 40), (172, 33)])
def test_matches_the_reference(ops, dtypes, hidden, ffn):
    spec = ExpertsSpec(5, hidden, ffn, tuple((dtype,) * 3 for dtype in dtypes))
    experts, expected = filled(ops.experts(spec)), filled(ReferenceOps().experts(spec))
    tolerance = 2e-2 if ops.isa in ROUNDS_ACTIVATIONS and "bfloat16" in dtypes else 2e-5
    for rows in (1, 2, 17, 130):
        x, (ids, weights) = torch.randn(rows, hidden), choices(rows, 3, 5)
        torch.testing.assert_close(experts(x, ids, weights), expected(x, ids, weights), rtol=tolerance, atol=tolerance)


def test_many_pairs(ops):
    """More pairs than one pass holds, and experts of more rows than one chunk."""
    spec = ExpertsSpec(4, 32, 32)
    experts, expected = filled(ops.experts(spec)), filled(ReferenceOps().experts(spec))
    x, (ids, weights) = torch.randn(2100, 32), choices(2100, 2, 4)
    torch.testing.assert_close(experts(x, ids, weights), expected(x, ids, weights), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(ops, dtype):
    spec = ExpertsSpec(6, 160, 72, ((dtype,) * 3,))
    experts, alone = filled(ops.experts(spec)), filled(CpuOps(ALONE, ops.isa).experts(spec))
    x, (ids, weights) = torch.randn(90, 160), choices(90, 2, 6)
    whole = experts(x, ids, weights)
    assert torch.equal(whole, alone(x, ids, weights))
    assert torch.equal(whole, torch.cat([experts(x[i : i + 1], ids[i : i + 1], weights[i : i + 1]) for i in range(90)]))


def test_nothing_chosen_is_zero(ops):
    experts = filled(ops.experts(ExpertsSpec(3, 40, 24)))
    assert torch.equal(experts(torch.randn(2, 40), torch.full((2, 2), -1, dtype=torch.int32), torch.ones(2, 2)), torch.zeros(2, 40))


def test_errors_name_the_thing():
    ops = CpuOps(TEAM)
    with pytest.raises(InvalidParameter, match="2 schemes were given for 3 experts"):
        ops.experts(ExpertsSpec(3, 8, 8, (("float32",) * 3,) * 2))
    with pytest.raises(Unsupported, match="int6_g16"):
        PackedExperts(TEAM, ExpertsSpec(3, 16, 16, (("int6_g16",) * 3,)))
    experts = filled(ops.experts(ExpertsSpec(3, 8, 8)))
    with pytest.raises(InternalError, match="down"):
        experts.load(0, "down", torch.zeros(8, 9))
    with pytest.raises(IndexError, match="expert 3 of 3"):
        experts(torch.zeros(1, 8), torch.tensor([[3]], dtype=torch.int32), torch.ones(1, 1))
