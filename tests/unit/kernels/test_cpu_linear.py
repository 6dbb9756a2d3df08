"""Packed linears: every instruction set of this machine against plain torch, and the bitwise promise."""

import pytest
import torch

from apportion.core.errors import InternalError, Unsupported
from apportion.kernels.cpu import ROUNDS_ACTIVATIONS, extension
from apportion.kernels.ops import LinearSpec

if not extension.available():
    pytest.skip(f"{extension.ABSENT}", allow_module_level=True)

from apportion.kernels.cpu.linear import PackedLinear

CPU = extension.load()
CHOSEN = CPU.features()["isa"]
SETS = [name for name, state in CPU.features()["sets"].items() if state["available"]]
DTYPES = ["float32", "bfloat16", "float16"]
TEAM = CPU.ThreadTeam(2)
ALONE = CPU.ThreadTeam(1)


@pytest.fixture(params=SETS)
def isa(request):
    CPU.select_isa(request.param)
    yield request.param
    CPU.select_isa(CHOSEN)


def packed(weight, dtype, bias=None, team=TEAM, row_steps=None):
    n, c = weight.shape
    linear = PackedLinear(team, LinearSpec(n, c, dtype, bias is not None))
    buffer = torch.full((linear.nbytes + 256,), 0xFF, dtype=torch.uint8)  # NaN everywhere: padding must be written
    start = -buffer.data_ptr() % 256
    linear.bind(buffer[start : start + linear.nbytes])
    steps = row_steps or [n]
    row = 0
    for count in steps:
        linear.load_rows(weight[row : row + count], row)
        row += count
    if bias is not None:
        linear.load_bias(bias, 0)
    return linear


def expected(x, weight, dtype, bias, isa):
    w = weight.to(getattr(torch, dtype)).double()
    if dtype in ROUNDS_ACTIVATIONS.get(isa, ()):
        x = x.bfloat16()
    y = x.double() @ w.T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [8, 80, 172, 2816, 33])
@pytest.mark.parametrize("n", [7, 105, 512])
def test_matches_torch(isa, dtype, n, c):
    generator = torch.Generator().manual_seed(n * c)
    weight = torch.randn(n, c, generator=generator) / c**0.5
    bias = torch.randn(n, generator=generator) if n != 105 else None
    linear = packed(weight, dtype, bias)
    x = torch.randn(40, c, generator=generator)
    y = expected(x, weight, dtype, bias, isa)
    for rows in (1, 2, 5, 13, 17, 33, 40):
        torch.testing.assert_close(linear(x[:rows]).double(), y[:rows], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_of_many_channels(isa, dtype):
    """Both the blocks over rows (512 at a time) and those over channels (1024 at a time) are crossed."""
    weight = torch.randn(70, 2100) / 2100**0.5
    bias = torch.randn(70)
    x = torch.randn(531, 2100)
    linear = packed(weight, dtype, bias)
    torch.testing.assert_close(linear(x).double(), expected(x, weight, dtype, bias, isa), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c"), [(105, 172), (512, 2816), (96, 1100)])
def test_a_row_does_not_depend_on_the_others(isa, dtype, n, c):
    weight = torch.randn(n, c)
    linear, alone = packed(weight, dtype), packed(weight, dtype, team=ALONE)
    x = torch.randn(531, c)
    whole = linear(x)
    assert torch.equal(whole, alone(x))
    assert torch.equal(whole[:40], torch.cat([linear(x[i : i + 1]) for i in range(40)]))
    for rows in (2, 3, 7, 12, 13, 16, 17, 24, 32, 33, 48, 100):
        assert torch.equal(whole[:rows], linear(x[:rows])), rows
        assert torch.equal(whole[531 - rows :], linear(x[531 - rows :])), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_give_back_what_was_packed(isa, dtype, source):
    weight = torch.randn(105, 171).to(source)
    linear = packed(weight, dtype, row_steps=[1, 30, 2, 40, 32])
    ids = torch.tensor([104, 0, 31, 32, 33, 0, 72], dtype=torch.int32)
    assert torch.equal(linear.rows(ids), weight[ids.long()].float().to(getattr(torch, dtype)).float())
    x = torch.randn(3, 171)
    assert torch.equal(linear(x), packed(weight, dtype)(x))
    assert torch.isfinite(linear(x)).all()


def test_rounding_and_special_values(isa):
    values = torch.tensor(
        [0.0, -0.0, 1e-8, 6.1e-5, 65519.0, 65520.0, 1e30, float("inf"), -float("inf"), float("nan"), 1 + 2**-9, 1 + 3 * 2**-9, 1e-40]
    )
    weight = values.repeat(1, 1)
    for dtype in DTYPES:
        got = packed(weight, dtype).rows(torch.zeros(1, dtype=torch.int32))
        assert torch.equal(got.nan_to_num(7.0), weight.to(getattr(torch, dtype)).float().nan_to_num(7.0)), dtype


def test_views_with_a_row_stride(isa):
    weight = torch.randn(64, 48)
    linear = packed(weight, "float32")
    wide = torch.randn(9, 100)
    out = torch.full((9, 80), -1.0)
    assert torch.equal(linear(wide[:, 20:68]), linear(wide[:, 20:68].contiguous()))
    linear(wide[:, 20:68], out[:, 8:72])
    assert torch.equal(out[:, 8:72], linear(wide[:, 20:68]))
    assert (out[:, :8] == -1).all() and (out[:, 72:] == -1).all()


def test_errors_name_the_thing():
    with pytest.raises(Unsupported, match="int6_g16"):
        PackedLinear(TEAM, LinearSpec(8, 16, "int6_g16"))
    linear = PackedLinear(TEAM, LinearSpec(8, 8))
    with pytest.raises(InternalError, match="bind"):
        linear.load_rows(torch.zeros(8, 8), 0)
    linear.bind(torch.zeros(linear.nbytes, dtype=torch.uint8))
    with pytest.raises(InternalError, match="rows 4 to 12"):
        linear.load_rows(torch.zeros(8, 8), 4)
    with pytest.raises(InternalError, match="8 input features"):
        linear.load_rows(torch.zeros(8, 9), 0)
    with pytest.raises(IndexError, match="row 8 "):
        linear.rows(torch.tensor([8], dtype=torch.int32))
