"""8-bit floating point by integer arithmetic, so that no target needs units for it: rounding, codes from numbers, numbers from codes.

Every float8 is exact in float16, bfloat16 and float32; its bits stand there under an exponent that is off by a power of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

# element -> (mantissa bits, what the bits of a code as those of a float32 are to be multiplied by)
FLOAT8 = {"e4m3": (3, 2.0**120), "e4m3fnuz": (3, 2.0**119), "e5m2": (2, 2.0**112)}
UNITS = {"e4m3": 2.0**8, "e5m2": 1.0}  # the same of the bits of a code as those of a float16


@triton.jit
def round_float8(x, LARGEST: tl.constexpr):
    """float32 -> the nearest float8 of the element whose largest number is LARGEST, ties to even, as float32; a NaN stays one."""
    MANTISSA: tl.constexpr = 2 if LARGEST == 57344.0 else 3
    LEAST: tl.constexpr = -14 if LARGEST == 57344.0 else (-6 if LARGEST == 448.0 else -7)  # exponent of the least normal number
    a = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    exponent = tl.maximum((a.to(tl.int32, bitcast=True) >> 23) & 0xFF, LEAST + 127)
    magic = (((exponent + (23 - MANTISSA)) << 23) | 0x400000).to(tl.float32, bitcast=True)  # its last place is a step of the grid
    return tl.where(x != x, x, (a + magic) - magic)


@triton.jit
def encode(x, LARGEST: tl.constexpr):
    """float32 -> the code, as int32, of the nearest number."""
    MANTISSA: tl.constexpr = 2 if LARGEST == 57344.0 else 3
    FACTOR: tl.constexpr = 2.0**-112 if LARGEST == 57344.0 else (2.0**-120 if LARGEST == 448.0 else 2.0**-119)
    code = (tl.abs(round_float8(x, LARGEST)) * FACTOR).to(tl.int32, bitcast=True) >> (23 - MANTISSA)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    if LARGEST == 240.0:  # e4m3fnuz: what would be a negative zero is its NaN
        return tl.where(x != x, 0x80, tl.where(code == 0, 0, code | sign))
    else:
        return tl.where(x != x, 0x7F, code | sign)


@triton.jit
def decode(codes, MANTISSA: tl.constexpr, FACTOR: tl.constexpr):
    """Codes as int32 -> float32."""
    bits = ((codes & 0x7F) << (23 - MANTISSA)) | ((codes & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * FACTOR


@triton.jit
def lane(words, LANE: tl.constexpr, MANTISSA: tl.constexpr):
    """The number in byte LANE of each word as float16, over its unit (UNITS). Bytes 0 and 2, and 1 and 3, are moved together."""
    if MANTISSA == 2:  # a float16 begins with the bits of an e5m2
        pair = (words << 8) & -0x00FF0100 if LANE % 2 == 0 else words & -0x00FF0100
    elif LANE % 2 == 0:
        pair = ((words & 0x007F007F) << 7) | ((words & 0x00800080) << 8)
    else:
        pair = ((words & 0x7F007F00) >> 1) | (words & -0x7FFF8000)
    return ((pair >> (LANE // 2 * 16)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
