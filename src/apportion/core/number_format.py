"""The torch-free half of a number format: what is stored for a matrix of weights, how many bytes that takes, and its name.

A format is spelt `element[_scale][_zero][_scale dtype][_perm]`:

    element      float32, bfloat16, float16 (no scale), e4m3, e5m2, e4m3fnuz (some GPUs' e4m3 of half the range), int2 .. int8
    scale        tensor, channel (one for each output), g128 (one for 128 inputs of an output), b128x128 (outputs x inputs)
    zero         zp: an integer zero point beside each scale; min: a float minimum beside each scale
    scale dtype  f16, bf16; float32 where nothing is said
    perm         the columns stand in another order than the inputs ("act-order"), which is stored with them

A scheme is what one product uses: a weight format and, after '@', the format its input is rounded to: `e4m3_channel@e4m3_token`,
`int4_g128_bf16` (weight-only). Activation scales: token (one for each row, made at run time), g128 (one for 128 channels of a row),
static (one number from calibration). kernels/reference/number_formats says what the codes mean.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from apportion.core.errors import InvalidParameter

FLOATS = {"float32": 32, "bfloat16": 16, "float16": 16}
BITS = FLOATS | {"e4m3": 8, "e4m3fnuz": 8, "e5m2": 8} | {f"int{bits}": bits for bits in (2, 3, 4, 5, 6, 7, 8)}
SCALE_DTYPES = {"": "float32", "f16": "float16", "bf16": "bfloat16"}
_TAGS = {dtype: tag for tag, dtype in SCALE_DTYPES.items()}
_SPELLING = re.compile(
    r"(?P<element>[a-z]+\d+(?:m\d+(?:fnuz)?)?)(?:_(?P<scale>tensor|channel|token|static|g\d+|b\d+x\d+))?(?:_(?P<zero>zp|min))?(?:_(?P<tag>f16|bf16))?(?P<perm>_perm)?"
)
_ACTIVATION_SCALES = ("token", "group", "static")


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """scale: 'none', 'tensor', 'channel', 'group', 'block', or of activations 'token', 'group', 'static'.

    block: outputs and inputs that share a scale, 0 for all of them. zero: 'none', 'zp' or 'min'.
    """

    element: str
    scale: str = "none"
    block: tuple[int, int] = (0, 0)
    zero: str = "none"
    scale_dtype: str = "float32"
    permuted: bool = False

    @classmethod
    def parse(cls, name: str) -> NumberFormat:
        """Errors: InvalidParameter for a name that no format has."""
        return _parse(name)

    @property
    def name(self) -> str:
        if self.is_float:
            return self.element
        rows, columns = self.block
        scale = {"group": f"g{columns}", "block": f"b{rows}x{columns}"}.get(self.scale, self.scale)
        parts = [self.element, scale, self.zero if self.zero != "none" else "", _TAGS[self.scale_dtype], "perm" if self.permuted else ""]
        return "_".join(part for part in parts if part)

    @property
    def is_float(self) -> bool:
        """Plain floating point, without scales."""
        return self.element in FLOATS

    @property
    def is_integer(self) -> bool:
        return self.element.startswith("int")

    @property
    def bits(self) -> int:
        """Of one code."""
        return BITS[self.element]

    def scale_shape(self, n: int, c: int) -> tuple[int, int]:
        """Scales of a matrix [n, c]. Groups and blocks at the ends may be smaller."""
        rows, columns = self.block
        return -(-n // (rows or max(n, 1))), -(-c // (columns or max(c, 1)))

    def stored_bytes(self, n: int, c: int) -> int:
        """Codes, scales, zeros and order of a matrix [n, c]: rows of codes are padded to 32-bit words, zero points packed along n."""
        if self.is_float or not self.is_integer:
            codes = n * c * self.bits // 8
        else:
            codes = n * -(-c * self.bits // 32) * 4
        if self.is_float:
            return codes
        rows, columns = self.scale_shape(n, c)
        scale_bytes = FLOATS[self.scale_dtype] // 8
        zeros = {"none": 0, "zp": -(-rows * self.bits // 32) * 4 * columns, "min": rows * columns * scale_bytes}[self.zero]
        return codes + rows * columns * scale_bytes + zeros + 4 * c * self.permuted

    def bits_per_weight(self, n: int = 4096, c: int = 4096) -> float:
        """Stored bits over numbers, scales included."""
        return 8 * self.stored_bytes(n, c) / (n * c)


@lru_cache(maxsize=1024)
def _parse(name: str) -> NumberFormat:
    found = _SPELLING.fullmatch(name)
    if found is None or found["element"] not in BITS:
        raise InvalidParameter(f"{name!r} is not the name of a number format, such as bfloat16, e4m3_channel, int4_g128 or e4m3_b128x128")
    element, scale = found["element"], found["scale"] or "none"
    extras = found["zero"] or found["tag"] or found["perm"]
    if (scale == "none") != (element in FLOATS) or (scale == "none" and extras):
        raise InvalidParameter(f"number format {name!r}: floating point has no scales, every other element needs them")
    if not element.startswith("int") and found["zero"]:
        raise InvalidParameter(f"number format {name!r}: only integers have zero points")
    block = {"tensor": (0, 0), "static": (0, 0), "channel": (1, 0), "token": (1, 0), "none": (0, 0)}.get(scale)
    if block is None:
        kind, numbers = ("block" if scale[0] == "b" else "group"), tuple(int(x) for x in scale[1:].split("x"))
        block = numbers if len(numbers) == 2 else (1, numbers[0])
        if 0 in block:
            raise InvalidParameter(f"number format {name!r}: a group has at least one number")
        scale = kind
    return NumberFormat(element, scale, block, found["zero"] or "none", SCALE_DTYPES[found["tag"] or ""], bool(found["perm"]))


@dataclass(frozen=True, slots=True)
class Scheme:
    """weight: how the matrix is stored. activation: what its input is rounded to, None for nothing."""

    weight: NumberFormat
    activation: NumberFormat | None = None

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Errors: InvalidParameter for a name that no scheme has."""
        weight, _, activation = name.partition("@")
        scheme = cls(NumberFormat.parse(weight), NumberFormat.parse(activation) if activation else None)
        rounded = scheme.activation
        if scheme.weight.scale in ("token", "static") or (rounded and (rounded.scale not in _ACTIVATION_SCALES or rounded.zero != "none")):
            raise InvalidParameter(f"{name!r} is no scheme: weights have scales tensor, channel, g.., b..x.., inputs token, g.., static")
        return scheme

    @property
    def name(self) -> str:
        return f"{self.weight.name}@{self.activation.name}" if self.activation else self.weight.name
