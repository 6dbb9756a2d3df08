"""How linears with scales are multiplied on a GPU: which units take them, what the library takes, and that both make one result."""

from importlib.util import find_spec

import pytest
import torch

from apportion.core.errors import Unsupported
from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.interval_table import LIBRARY, Choice
from apportion.kernels.ops import ExpertsSpec, LinearSpec
from apportion.kernels.reference.number_formats import FLOAT8, quantize, quantize_activation

pytestmark = pytest.mark.skipif(not find_spec("triton") or torch.cuda.is_available(), reason="needs Triton and its interpreter")


def made(scheme, n, c, choose):
    from apportion.kernels.triton.quantized import CodedLinear
    from apportion.kernels.triton.tiles import Tiles

    op = CodedLinear(LinearSpec(n, c, scheme, bias=True), Tiles().flat, ("e4m3",), choose)
    op.bind(torch.zeros(op.nbytes, dtype=torch.uint8))
    generator = torch.Generator().manual_seed(1)
    q = quantize(torch.randn(n, c, generator=generator), Scheme.parse(scheme).weight)
    q.input_scale = torch.tensor([0.02]) if "static" in scheme else None
    op.load_rows(q, 0)
    op.load_bias(torch.randn(n, generator=generator), 0)
    return op


@pytest.mark.parametrize("scheme", ["e4m3_channel@e4m3_token", "e4m3_tensor@e4m3_static", "e4m3_tensor@e4m3_token"])
def test_the_library_and_the_flat_kernel_agree(scheme):
    x = torch.randn(70, 96, generator=torch.Generator().manual_seed(2))
    by_library, flat = (made(scheme, 48, 96, choose)(x) for choose in (lambda _: LIBRARY, None))
    torch.testing.assert_close(by_library, flat, rtol=1e-5, atol=1e-5)


def test_the_library_begins_where_the_tiles_end(monkeypatch):
    from apportion.kernels.triton.quantized import CodedLinear
    from apportion.kernels.triton.tiles import MOST_ROWS, Tiles

    monkeypatch.setattr(CodedLinear, "_by_library", lambda self, x, out: out.fill_(1.0))
    monkeypatch.setattr(CodedLinear, "_flat", lambda self, x, out, choice: out.fill_(0.0))
    for library in (False, True):
        op = CodedLinear(LinearSpec(48, 96, "e4m3_channel@e4m3_token"), Tiles().flat, ("e4m3",), library=library)
        op.bind(torch.zeros(op.nbytes, dtype=torch.uint8))
        assert [bool(op(torch.ones(rows, 96)).any()) for rows in (1, MOST_ROWS, MOST_ROWS + 1)] == [False, False, library]


@pytest.mark.parametrize(
    ("scheme", "on_ada", "on_ampere"),
    [
        ("e4m3_channel@e4m3_token", "bytes", "bfloat16"),
        ("e4m3_b128x128@e4m3_g128", "bytes", "bfloat16"),
        ("e5m2_tensor@e4m3_static", "bfloat16", "bfloat16"),
        ("e4m3_channel", "bfloat16", "bfloat16"),
        ("int8_channel@int8_token", "bytes", "bytes"),
        ("int8_channel_zp@int8_token", "bfloat16", "bfloat16"),
        ("int4_g128_zp@int8_token", "int8", "int8"),
        ("int4_channel@e4m3_token", "bfloat16", "bfloat16"),
        ("int8_g48@int8_token", "float32", "float32"),
    ],
)
def test_what_is_multiplied(scheme, on_ada, on_ampere):
    from apportion.kernels.triton.quantized import product_of

    assert product_of(Scheme.parse(scheme), ("e4m3",)) == on_ada
    assert product_of(Scheme.parse(scheme), ()) == on_ampere


@pytest.mark.parametrize(
    ("scheme", "shape", "obstacle"),
    [
        ("e4m3_channel@e4m3_token", (4096, 4096), ""),
        ("e4m3_channel@e4m3_token", (4096, 4100), "it takes multiples of 16, not 4096 x 4100"),
        ("e4m3_b128x128@e4m3_g128", (4096, 4096), "it takes one scale for a row, not several inside a sum"),
        ("int8_channel@int8_token", (4096, 4096), "it takes float8 by float8, where matrix units do"),
    ],
)
def test_what_the_library_takes(scheme, shape, obstacle):
    from apportion.kernels.triton.quantized import library_obstacle

    assert library_obstacle(LinearSpec(*shape, scheme), ("e4m3",)) == obstacle
    assert library_obstacle(LinearSpec(*shape, scheme), ())


@pytest.mark.parametrize("element", ["e4m3", "e4m3fnuz", "e5m2"])
def test_inputs_as_bytes(element):
    """The codes that a matrix unit is given are those of the definition, whatever it calls NaN and zero."""
    from apportion.kernels.triton.rounding import Rounding

    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, 100)
    x[0, 3], x[1, 5] = -1e-30, 0.0
    fmt = NumberFormat.parse(f"{element}_g50")
    rounded = Rounding(fmt, FLOAT8[element])(x)
    codes, scales = quantize_activation(x, fmt)
    assert torch.equal(rounded.codes.float(), codes) and torch.equal(rounded.scales, scales)


@pytest.mark.parametrize("name", ["e4m3_token", "int8_token", "e4m3_g128", "int8_g32", "e4m3_static", "e4m3_g96"])
@pytest.mark.parametrize("width", [100, 384])
def test_norms_and_gates_rounded_in_one_pass(name, width):
    """Bit for bit what two passes make, with the residual updated; groups that are no power of 2 take two."""
    from apportion.kernels.triton import elementwise
    from apportion.kernels.triton.rounding import Rounding

    generator = torch.Generator().manual_seed(4)
    x, weight, residual = (torch.randn(*shape, generator=generator) for shape in ((3, 2 * width), (width,), (3, width)))
    fmt = NumberFormat.parse(name)
    rounding = Rounding(fmt, torch.int8 if fmt.is_integer else FLOAT8[fmt.element], torch.tensor([0.02]) if fmt.scale == "static" else None)
    mine, theirs = residual.clone(), residual.clone()
    pairs = (
        (rounding.rms_norm(x[:, :width], None, weight, 1e-6), rounding(elementwise.rms_norm(x[:, :width], weight, 1e-6))),
        (rounding.rms_norm(x[:, :width], mine, weight, 1e-6), rounding(elementwise.add_rms_norm(x[:, :width], theirs, weight, 1e-6))),
        (rounding.silu_mul(x), rounding(elementwise.silu_mul(x))),
    )
    for fused, apart in pairs:
        assert torch.equal(fused.codes.float(), apart.codes.float()) and torch.equal(fused.scales, apart.scales)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("scheme", "reason"), [("e4m3_tensor@e4m3_static", "by a scale of its own"), ("int4_g32_perm", "in an order of its own")]
)
def test_experts_that_cannot_share_their_tokens_are_refused(scheme, reason):
    from apportion.kernels.triton.ops import TritonOps

    with pytest.raises(Unsupported, match=f"{scheme} have no grouped Triton kernel.* {reason}; take device=cpu"):
        TritonOps(True, torch.device("cpu"), 1 << 20).experts(ExpertsSpec(2, 64, 64, ((scheme,) * 3,)))


@pytest.mark.parametrize("scheme", ["e4m3_channel@e4m3_token", "int8_g32@int8_token", "e4m3_b128x128@e4m3_g128"])
def test_parts_of_the_inputs_are_added(scheme):
    x = torch.randn(3, 1100, generator=torch.Generator().manual_seed(6))
    parts, whole = (made(scheme, 40, 1100, lambda _, splits=splits: Choice("flat", 0, splits))(x) for splits in (4, 1))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)
