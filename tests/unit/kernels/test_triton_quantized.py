"""How linears with scales are multiplied on a GPU: which units take them, what the library takes, and that both make one result."""

from importlib.util import find_spec

import pytest
import torch

from apportion.core.number_format import NumberFormat, Scheme
from apportion.kernels.interval_table import LIBRARY
from apportion.kernels.ops import LinearSpec
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
