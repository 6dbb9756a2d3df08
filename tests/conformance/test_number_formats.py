"""Every scheme of every implementation: packing to the bit, the grids, products against the dequantized oracle, and independent rows."""

import math

import pytest
import torch
import torch.nn.functional as F

from apportion.core.errors import InvalidParameter
from apportion.core.number_format import BITS, FLOATS, NumberFormat, Scheme
from apportion.kernels.ops import ExpertsSpec, LinearSpec, QuantizedWeight
from apportion.kernels.reference.number_formats import (
    FLOAT8_MAX,
    dequantize,
    pack,
    quantize,
    quantize_activation,
    to_float8,
    unpack,
)
from tests.conformance.test_linear import buffer, routed, seen_by


@pytest.fixture(autouse=True)
def takes_scales(request):
    """Implementations whose linears are floating point alone are not asked."""
    if "make_ops" in request.fixturenames and not request.getfixturevalue("capability").quantized:
        pytest.skip("quantized linears are not declared")


INTEGERS = [element for element in BITS if element.startswith("int")]
WEIGHT_ONLY = [
    "e4m3_tensor", "e4m3_channel", "e4m3_b128x128", "e5m2_channel", "int8_channel", "int8_g32_f16", "int8_channel_zp", "int6_g16",
    "int4_g128_bf16", "int4_g32_zp_f16", "int4_g32_min", "int4_channel", "int4_g64_f16_perm", "int3_g128", "int3_g32_zp_f16", "int2_g64_zp",
    "int2_channel", "int5_g128", "int6_g32_zp_f16", "int7_channel",
]  # fmt: skip
ROUNDED = [
    "e4m3_channel@e4m3_token", "e4m3_tensor@e4m3_static", "e4m3_b128x128@e4m3_g128", "int8_channel@int8_token", "int8_channel@int8_static",
    "int8_channel_zp@int8_token", "int4_g128@int8_token", "int4_channel@e4m3_token", "int2_g32_zp@int8_token", "int3_g64@int8_token",
    "int4_g32_min@int8_token", "int5_channel@int8_static", "int6_g128_bf16@int8_token", "int7_g64_zp_f16@int8_token",
]  # fmt: skip
SHAPES = [(1, 1), (33, 47), (130, 300)]


def weight_of(scheme, n, c, seed=0):
    """A random matrix as codes of the scheme, with all that it stores."""
    fmt = Scheme.parse(scheme).weight
    generator = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(n, c, generator=generator) + 0.2, fmt)
    if fmt.permuted:
        q.order = torch.randperm(c, generator=generator).int()
    if "static" in scheme:
        q.input_scale = torch.tensor([0.031])
    return q


def made(ops, scheme, n, c, bias=False):
    q, op = weight_of(scheme, n, c), ops.linear(LinearSpec(n, c, scheme, bias))
    op.bind(buffer(op.nbytes))
    op.load_rows(q, 0)
    if bias:
        op.load_bias(torch.linspace(-1, 1, n), 0)
    return op, q


def oracle(q, scheme, x):
    """In float64: the rounded input as real numbers times the dequantized weight."""
    activation, seen = Scheme.parse(scheme).activation, x
    if activation is not None:
        codes, scale = quantize_activation(x, activation, q.input_scale)
        width = activation.block[1] or x.shape[1]
        seen = codes.double() * scale.double().repeat_interleave(width, 1)[:, : x.shape[1]]
    return F.linear(seen.double(), dequantize(q).double()), F.linear(seen.abs().double(), dequantize(q).abs().double())


@pytest.mark.parametrize("name", WEIGHT_ONLY + list(FLOATS))
def test_names_and_formats_are_one(name):
    assert NumberFormat.parse(name).name == name and NumberFormat.parse(NumberFormat.parse(name).name) == NumberFormat.parse(name)


@pytest.mark.parametrize("name", ["int9_channel", "int4", "float32_channel", "e4m3_g0", "e4m3_channel_zp", "int4_token_x", "", "fp8"])
def test_what_is_no_format_is_refused(name):
    with pytest.raises(InvalidParameter, match="number format"):
        NumberFormat.parse(name)


@pytest.mark.parametrize("name", ["int4_token", "e4m3_channel@e4m3_channel", "int8_channel@int8_token_zp"])
def test_what_is_no_scheme_is_refused(name):
    with pytest.raises(InvalidParameter, match="no scheme"):
        Scheme.parse(name)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("c", [1, 2, 7, 31, 32, 33, 63, 64, 95, 100])
def test_pack_is_the_bit_string(bits, c):
    """Against the definition: one long little-endian string of bits for each row."""
    codes = torch.randint(0, 2**bits, (3, c), dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (3, math.ceil(c * bits / 32)) and torch.equal(unpack(words, bits, c), codes)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        string = sum(code << (i * bits) for i, code in enumerate(row))
        assert [word % 2**32 for word in packed] == [string >> (32 * w) & 0xFFFFFFFF for w in range(len(packed))]


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_float8_saturates_and_rounds_to_even(element):
    """Against the format's definition: every finite number it has, and the nearest of them for numbers in between."""
    exponent_bits, mantissa_bits = (4, 3) if element == "e4m3" else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    values = set()
    for code in range(128):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        top = 2**exponent_bits - 1
        if exponent == top and (mantissa == 7 if element == "e4m3" else True):
            continue
        values.add((mantissa + (2**mantissa_bits if exponent else 0)) * 2.0 ** (max(exponent, 1) - bias - mantissa_bits))
    grid = sorted(values | {-v for v in values})
    assert grid[-1] == FLOAT8_MAX[element]
    x = torch.cat([torch.tensor(grid), torch.randn(2000) * 3, torch.randn(200) * 1e5, torch.tensor([float("inf"), -1e9])])
    points = torch.tensor(grid, dtype=torch.float64)
    distance = (x.double().clamp(-FLOAT8_MAX[element], FLOAT8_MAX[element])[:, None] - points).abs()
    assert torch.equal((to_float8(x, element).double() - x.double().clamp(points[0], points[-1])).abs(), distance.amin(1))
    assert to_float8(torch.tensor([float("nan")]), element).float().isnan().all()
    halfway = torch.tensor([(grid[i] + grid[i + 1]) / 2 for i in range(len(grid) - 1)])
    codes = to_float8(halfway, element).view(torch.uint8)
    assert (codes % 2 == 0).all()


@pytest.mark.parametrize("name", WEIGHT_ONLY)
@pytest.mark.parametrize("n, c", [*SHAPES, (128, 256)], ids=str)
def test_quantize_is_nearest_and_idempotent(name, n, c):
    fmt = NumberFormat.parse(name)
    w = torch.randn(n, c) * torch.logspace(-2, 2, n)[:, None]
    q = quantize(w, fmt)
    assert q.scale.shape == fmt.scale_shape(n, c) and q.codes.shape == (n, c) and int(q.codes.max()) < 2**fmt.bits
    dense = dequantize(q)
    rows, columns = fmt.block
    wide = q.scale.repeat_interleave(rows or n, 0)[:n].repeat_interleave(columns or c, 1)[:, :c]
    if fmt.is_integer:  # half a step inside the grid; the step at its upper end is cut off by half more where it is symmetric
        step = 0.5 if fmt.zero != "none" else 1.0
        slack = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[fmt.scale_dtype]
        assert ((dense - w).abs() <= wide * step * (1 + slack) + wide * slack * 2**fmt.bits).all()
    else:
        mantissa, least = (3, 2.0**-9) if fmt.element == "e4m3" else (2, 2.0**-16)
        assert ((dense - w).abs() <= torch.maximum(w.abs() * 2.0 ** -(mantissa + 1), wide * least / 2) * (1 + 1e-5)).all()
    stored = q.scale.to({"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[fmt.scale_dtype])
    assert torch.equal(stored.float(), q.scale), "scales are representable as they are stored"


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_zero_rows_stay_zero(name):
    assert torch.equal(dequantize(quantize(torch.zeros(5, 40), NumberFormat.parse(name))), torch.zeros(5, 40))


@pytest.mark.parametrize("scheme", WEIGHT_ONLY + ROUNDED)
@pytest.mark.parametrize("n, c", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(make_ops, capability, scheme, n, c, bias, thin):
    op, q = made(make_ops("linear"), scheme, n, c, bias)
    for rows in thin((40, 1, 3, 16)):
        given = torch.randn(rows, c)
        if q.format.block[1] % 32:  # dequantized for the float32 kernel where packed ones take no such groups: nothing may be rounded
            given = given.bfloat16().float()
        x = given if "@" in scheme else seen_by(capability, given, q.format.element)
        permuted = x if q.order is None else x.index_select(1, q.order.long())
        plain = QuantizedWeight(q.format, q.codes, q.scale, q.zero, None, q.input_scale)
        expected, magnitude = oracle(plain, scheme, permuted)
        added = torch.linspace(-1, 1, n) if bias else torch.zeros(n)
        y = op(given)
        assert y.shape == (rows, n) and y.dtype == torch.float32
        slack = 6e-7 * max(4, c**0.5) + (capability.float8_error if "@e4m3" in scheme else 0)
        assert ((y - added - expected).abs() <= slack * (magnitude + 1)).all(), f"T={rows}"


LONG = [
    "e4m3_channel", "e4m3_b128x128@e4m3_g128", "e4m3_b32x64@e4m3_token", "e4m3_channel@e4m3_g64", "e5m2_tensor@e4m3_static",
    "int8_channel@int8_token", "int8_g64_bf16@int8_static", "int8_g96", "int8_g32@int8_token", "int8_tensor_zp@int8_token",
    "int4_g128_bf16", "int4_g32_zp_f16", "int4_g128@e4m3_g256", "int4_g512_min", "int3_channel_perm", "int3_g256_zp",
    "int2_g64_min_f16", "int2_channel@int4_token", "int4_g256_zp@int8_token", "int3_g96_f16@int8_g32", "int2_channel@int8_token",
    "int4_g512_min_perm@int8_static", "int5_g64_bf16", "int6_g128@int8_g128", "int7_channel_zp",
]  # fmt: skip


@pytest.mark.parametrize("scheme", LONG)
def test_long_rows_in_blocks(make_ops, capability, batch_invariant, scheme):
    """More channels than are unpacked at a time, fewer and more rows than share a pass; groups of all sizes; every part of the bias."""
    ops, n, c = make_ops("linear", 2), 70, 1100
    op, q = made(ops, scheme, n, c, True)
    given = torch.randn(530, c)
    x = given if "@" in scheme else seen_by(capability, given, q.format.element)
    expected, magnitude = oracle(
        QuantizedWeight(q.format, q.codes, q.scale, q.zero, None, q.input_scale), scheme, x if q.order is None else x[:, q.order.long()]
    )
    y = op(given)
    assert ((y - torch.linspace(-1, 1, n) - expected).abs() <= 6e-7 * c**0.5 * (magnitude + 1)).all()
    for first, last in ((0, 1), (529, 530), (3, 15), (3, 16), (40, 72), (40, 73), (1, 514)):
        assert torch.equal(op(given[first:last]), y[first:last]), f"rows {first} to {last}"


@pytest.mark.parametrize("scheme", ["e4m3_channel@e4m3_token", "int8_channel@int8_token", "int8_channel@int8_static", "int4_g32"])
def test_a_row_of_nan_stays_its_own(make_ops, scheme):
    op, _ = made(make_ops("linear"), scheme, 40, 96)
    x = torch.randn(5, 96)
    whole = op(x)
    x[2, 17] = float("nan")
    y = op(x)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


@pytest.mark.parametrize("scheme", ["int4_g64_f16_perm", "int3_g32_perm"])
def test_order_is_the_inputs(make_ops, scheme):
    op, q = made(make_ops("linear"), scheme, 33, 100)
    x = torch.randn(4, 100).bfloat16().float()
    torch.testing.assert_close(op(x), F.linear(x, dequantize(q)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_rows_are_the_weight(make_ops, scheme):
    op, q = made(make_ops("linear"), scheme, 150, 70)
    ids = torch.tensor([149, 0, 33, 33, 128], dtype=torch.int32)
    assert torch.equal(op.rows(ids), dequantize(q)[ids.long()])


@pytest.mark.parametrize("scheme", ["e4m3_channel", "e4m3_b128x128", "int4_g32_zp_f16", "int3_g32", "int8_channel@int8_token"])
def test_loads_in_pieces_and_binds_packed_bytes(make_ops, scheme):
    ops = make_ops("linear")
    whole, q = made(ops, scheme, 300, 96)
    pieces = ops.linear(LinearSpec(300, 96, scheme))
    storage = buffer(pieces.nbytes)
    pieces.bind(storage)
    step = q.format.block[0]
    for first in range(0, 300, 128):
        rows, scales = slice(first, min(first + 128, 300)), slice(first // step, -(-min(first + 128, 300) // step))
        pieces.load_rows(QuantizedWeight(q.format, q.codes[rows], q.scale[scales], None if q.zero is None else q.zero[scales]), first)
    x = torch.randn(5, 96)
    assert torch.equal(whole(x), pieces(x))
    attached = ops.linear(LinearSpec(300, 96, scheme))
    attached.bind(storage)
    assert torch.equal(whole(x), attached(x))


@pytest.mark.parametrize("scheme", WEIGHT_ONLY + ROUNDED)
def test_rows_do_not_see_each_other(make_ops, batch_invariant, scheme):
    x = torch.randn(40, 300)
    op, _ = made(make_ops("linear"), scheme, 65, 300, True)
    two, _ = made(make_ops("linear", 2), scheme, 65, 300, True)
    whole = op(x)
    assert torch.equal(whole, two(x)), "one and two threads differ"
    for first, last in ((0, 1), (13, 14), (39, 40), (3, 6), (2, 18), (0, 33)):
        assert torch.equal(op(x[first:last]), whole[first:last])


@pytest.mark.parametrize("scheme", [f"int{bits}_channel@int8_token" for bits in range(2, 9)])
def test_eight_bit_products_are_exact(make_ops, scheme):
    """Integer sums are exact in float32 up to 2^24, and in 32 bits beyond: the kernels and integer arithmetic agree bit for bit."""
    op, q = made(make_ops("linear"), scheme, 64, 512)
    x = torch.randn(9, 512)
    codes, scale = quantize_activation(x, NumberFormat.parse("int8_token"))
    sums = codes.long() @ (q.codes.long() - 2 ** (q.format.bits - 1)).T
    assert sums.abs().max() < 2**24
    assert torch.equal(op(x), sums.float() * scale * q.scale.T)


@pytest.mark.parametrize("c", [1 << 16, (1 << 16) + 32])
@pytest.mark.parametrize("code", [0, 255])
def test_sums_of_the_largest_products(make_ops, c, code):
    """As many inputs as a sum of 32 bits holds, and more: every product the largest there is, of either sign."""
    fmt = NumberFormat.parse("int8_channel")
    op = make_ops("linear").linear(LinearSpec(3, c, "int8_channel@int8_static"))
    op.bind(buffer(op.nbytes))
    codes = torch.full((3, c), code, dtype=torch.uint8)
    op.load_rows(QuantizedWeight(fmt, codes, torch.ones(3, 1), None, None, torch.ones(1)), 0)
    x = torch.tensor([[-128.0], [127.0]]).expand(2, c).contiguous()
    expected = x[:, :1].double() * (code - 128) * c
    # Equal products added in float32 are all rounded to the same side; a sum of 32 bits that ran over would have the wrong sign.
    assert ((op(x).double() - expected).abs() <= 1e-2 * expected.abs()).all()


def test_float8_emulation_is_the_dequantized_oracle(make_ops, capability):
    """With power-of-two scales both roads round alike: codes times codes, scaled, and dequantized numbers multiplied."""
    ops = make_ops("linear")
    op = ops.linear(LinearSpec(96, 160, "e4m3_channel@e4m3_static"))
    op.bind(buffer(op.nbytes))
    fmt = NumberFormat.parse("e4m3_channel")
    q = quantize(torch.randn(96, 160), fmt)
    q.scale = 2.0 ** q.scale.log2().floor()
    q.input_scale = torch.tensor([2.0**-6])
    op.load_rows(q, 0)
    dense = ops.linear(LinearSpec(96, 160, "bfloat16"))  # which holds all of these numbers
    dense.bind(buffer(dense.nbytes))
    dense.load_rows(dequantize(q), 0)
    x = torch.randn(7, 160)
    rounded_x = to_float8(x * 64, "e4m3").float() / 64
    magnitude = rounded_x.abs() @ dequantize(q).abs().T
    assert ((op(x) - dense(rounded_x)).abs() <= capability.float8_error * magnitude).all()


MIXED = (
    ("e4m3_channel@e4m3_token", "e4m3_channel@e4m3_token", "bfloat16"),
    ("int4_g32_zp_f16", "int3_g32", "int8_channel"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("int2_g32_zp", "int4_g32", "e4m3_b128x128"),
    ("float32", "float32", "float32"),
)


def mixed_experts(ops, hidden=48, ffn=40):
    spec = ExpertsSpec(len(MIXED), hidden, ffn, MIXED)
    op, dense = ops.experts(spec), []
    op.bind(buffer(op.nbytes))
    for expert, schemes in enumerate(MIXED):
        dense.append([])
        for projection, scheme, (n, c) in zip(("gate", "up", "down"), schemes, ((ffn, hidden), (ffn, hidden), (hidden, ffn)), strict=True):
            fmt = Scheme.parse(scheme).weight
            if fmt.is_float:
                w = (torch.randn(n, c, generator=torch.Generator().manual_seed(expert)) * c**-0.5).to(getattr(torch, scheme))
                op.load(expert, projection, w)
                dense[-1].append((w.float(), None))
            else:
                q = weight_of(scheme, n, c, expert)
                op.load(expert, projection, q)
                dense[-1].append((dequantize(q), Scheme.parse(scheme).activation))
    return op, dense


def rounded(x, activation):
    if activation is None:
        return x
    codes, scale = quantize_activation(x, activation)
    return codes * scale


def test_mixed_experts(make_ops):
    op, dense = mixed_experts(make_ops("experts"))
    x, (ids, weights) = torch.randn(20, 48), routed(20, len(MIXED), 3, 0.2)
    expected = torch.zeros(20, 48)
    for t in range(20):
        for expert, p in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            if expert >= 0:
                (gate, a), (up, b), (down, d) = dense[expert]
                h = F.silu(F.linear(rounded(x[t : t + 1], a), gate)) * F.linear(rounded(x[t : t + 1], b), up)
                expected[t] += p * F.linear(rounded(h, d), down)[0]
    torch.testing.assert_close(op(x, ids, weights), expected, rtol=5e-3, atol=5e-3 * expected.abs().max().item())


def test_mixed_experts_rows_do_not_see_each_other(make_ops, batch_invariant):
    (op, _), (two, _) = mixed_experts(make_ops("experts")), mixed_experts(make_ops("experts", 2))
    x, (ids, weights) = torch.randn(30, 48), routed(30, len(MIXED), 2)
    whole = op(x, ids, weights)
    assert torch.equal(two(x, ids, weights), whole)
    for first, last in ((0, 1), (29, 30), (3, 5), (10, 27)):
        assert torch.equal(op(x[first:last], ids[first:last], weights[first:last]), whole[first:last])


@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g128_f16", "int4_g32_zp_f16", "int3_g128_bf16", "int8_channel", "e4m3_b128x128"])
def test_memory_is_what_is_predicted(make_ops, scheme):
    """Bytes in memory within 3 % of the bytes stored in a file (zero points are packed there)."""
    n, c = 1024, 2048
    op = make_ops("linear").linear(LinearSpec(n, c, scheme))
    assert op.nbytes == pytest.approx(NumberFormat.parse(scheme).stored_bytes(n, c), rel=0.03)
