"""8-bit floating point by integer arithmetic, so that no target needs units for it: rounding, codes from numbers, numbers from codes.

Every float8 is exact in float16, bfloat16 and float32; its bits stand there under an exponent that is off by a power of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

# element -> (mantissa bits, exponent of the least normal number, what the bits of a code as those of a float32 are to be multiplied by)
FLOAT8 = {"e4m3": (3, -6, 2.0**120), "e4m3fnuz": (3, -7, 2.0**119), "e5m2": (2, -14, 2.0**112)}
UNITS = {"e4m3": 2.0**8, "e5m2": 1.0}  # the same of the bits of a code as those of a float16


@triton.jit
def round_float8(x, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr):
    """float32 -> the nearest float8, ties to even, as float32; what is larger becomes LARGEST, a NaN stays one."""
    a = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    exponent = tl.maximum((a.to(tl.int32, bitcast=True) >> 23) & 0xFF, LEAST + 127)
    magic = (((exponent + (23 - MANTISSA)) << 23) | 0x400000).to(tl.float32, bitcast=True)  # its last place is a step of the grid
    return tl.where(x != x, x, (a + magic) - magic)


@triton.jit
def encode(x, MANTISSA: tl.constexpr):
    """float32 -> the code, as int32, of the nearest number of e4m3 (MANTISSA 3) or e5m2 (2)."""
    LEAST: tl.constexpr = -6 if MANTISSA == 3 else -14
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    rounded = tl.abs(round_float8(x, MANTISSA, LEAST, LARGEST))
    shifted = (rounded * (2.0**-120 if MANTISSA == 3 else 2.0**-112)).to(tl.int32, bitcast=True) >> (23 - MANTISSA)
    return tl.where(x != x, 0x7F, shifted) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


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
