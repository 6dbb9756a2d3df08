"""The one definition of every number format: the grid of its codes, quantize, dequantize, and how codes pack into words.

    real = code * scale                     e4m3, e5m2
    real = (code - zero) * scale            integers; without zero points zero is 2^(bits - 1)
    real = code * scale + minimum           integers with minima

The scale always multiplies. Integer scales follow compressed-tensors: max|w| / ((2^bits - 1) / 2) symmetric, (max - min) / (2^bits - 1)
with zero points, where the range is first widened to hold 0. e4m3 is e4m3fn: no infinities, largest 448.
e4m3fnuz: bias 8, largest 240, NaN 0x80.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from apportion.core.errors import InternalError, Unsupported
from apportion.core.number_format import NumberFormat
from apportion.kernels.ops import QuantizedWeight

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e4m3fnuz": torch.float8_e4m3fnuz}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT8_MAX = {"e4m3": 448.0, "e5m2": 57344.0, "e4m3fnuz": 240.0}
_PIECE = 1 << 22  # codes packed at a time
LEAST_TOKEN_SCALE = 1 / (448 * 512)  # of a float8 activation: what the common GPU kernels floor it at


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, C] below 2^bits -> int32 words [n, ceil(C * bits / 32)], the first code in the lowest bits; codes straddle words."""
    n, c = codes.shape
    words = torch.zeros(n, -(-c // 32), bits, dtype=torch.int32, device=codes.device)
    step = max(1, _PIECE // max(c, 1))
    for first in range(0, n, step):
        piece = torch.nn.functional.pad(codes[first : first + step], (0, -c % 32)).unflatten(1, (-1, 32)).to(torch.int32)
        into = words[first : first + step]
        for i in range(32):
            word, shift = divmod(i * bits, 32)
            into[:, :, word] |= piece[:, :, i] << shift
            if shift + bits > 32:
                into[:, :, word + 1] |= piece[:, :, i] >> 32 - shift
    return words.flatten(1)[:, : -(-c * bits // 32)].contiguous()


def unpack(words: Tensor, bits: int, c: int) -> Tensor:
    """The inverse of `pack`: int32 [n, W] -> uint8 [n, c]."""
    n = len(words)
    rows = torch.nn.functional.pad(words, (0, -(-c // 32) * bits - words.shape[1])).view(n, -1, bits)
    codes = torch.empty(n, rows.shape[1], 32, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = rows[:, :, word] >> shift
        if shift + bits > 32:  # the sign bits that >> brought in lie above what the next word supplies
            code = code & (1 << 32 - shift) - 1 | rows[:, :, word + 1] << 32 - shift
        codes[:, :, i] = code & mask
    return codes.flatten(1)[:, :c].contiguous()


def spread(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """One number for each block [R, G] -> one for each element [n, c], as a view where that is possible."""
    (n, c), (rows, columns) = shape, block
    if scale.shape[0] not in (1, n):
        scale = scale.repeat_interleave(rows, 0)[:n]
    if scale.shape[1] not in (1, c):
        scale = scale.repeat_interleave(columns, 1)[:, :c]
    return scale.expand(n, c)


def quantize(weight: Tensor, fmt: NumberFormat) -> QuantizedWeight:
    """Round weight [n, C] (finite, any float dtype) to the nearest numbers of `fmt`, with the scales that its extremes ask for."""
    w = weight.float()
    low, high = _extremes(w, fmt)
    scale, zero = scale_for(low, high, fmt)
    return QuantizedWeight(fmt, encode(w, scale, zero, fmt), scale, zero)


def scale_for(low: Tensor, high: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros for blocks whose numbers lie in [low, high] (both [R, G], low <= 0 <= high)."""
    stored = TORCH_DTYPES[fmt.scale_dtype]
    least = torch.finfo(stored).tiny if stored != torch.float16 else 2.0**-24
    levels = 2**fmt.bits - 1
    if fmt.zero == "none":
        reach = FLOAT8_MAX[fmt.element] if not fmt.is_integer else levels / 2
        scale = (torch.maximum(-low, high) / reach).to(stored).float()
        return torch.where(scale == 0, torch.finfo(stored).eps, scale), None
    scale = ((high - low) / levels).to(stored).float().clamp(min=least)
    if fmt.zero == "min":
        return scale, low.to(stored).float()
    return scale, (-low / scale).round_().clamp_(0, levels).to(torch.uint8)


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat) -> Tensor:
    """The codes of w float32 [n, C] under given scales: uint8 [n, C]."""
    wide = spread(scale, (w.shape[0], w.shape[1]), fmt.block)
    if not fmt.is_integer:
        return to_float8(w / wide, fmt.element).view(torch.uint8)
    if fmt.zero == "min":
        assert zero is not None
        codes = ((w - spread(zero, (w.shape[0], w.shape[1]), fmt.block)) / wide).round_()
    else:
        codes = (w / wide).round_() + (2 ** (fmt.bits - 1) if zero is None else spread(zero, (w.shape[0], w.shape[1]), fmt.block))
    return codes.clamp_(0, 2**fmt.bits - 1).to(torch.uint8)


def decode(q: QuantizedWeight) -> Tensor:
    """Codes as float32 [n, C], before any scale: integers count from their zero point (from 0 where there are minima)."""
    fmt = q.format
    if not fmt.is_integer:
        return q.codes.view(FLOAT8[fmt.element]).float()
    codes = q.codes.float()
    if fmt.zero == "min":
        return codes
    return codes - (2 ** (fmt.bits - 1) if q.zero is None else spread(q.zero, _shape(q), fmt.block).float())


def dequantize(q: QuantizedWeight) -> Tensor:
    """float32 [n, C], its columns in the order of the inputs."""
    w = decode(q).mul_(spread(q.scale, _shape(q), q.format.block))
    if q.format.zero == "min":
        assert q.zero is not None
        w += spread(q.zero, _shape(q), q.format.block)
    if q.order is None:
        return w
    return torch.empty_like(w).index_copy_(1, q.order.long(), w)


def to_float8(x: Tensor, element: str) -> Tensor:
    """Saturating: a plain cast makes NaN of what is beyond the largest number. NaN stays NaN."""
    limit = FLOAT8_MAX[element]
    return x.clamp(-limit, limit).to(FLOAT8[element])


def quantize_activation(x: Tensor, fmt: NumberFormat, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x float32 [T, C] -> (codes as float32 [T, C], scales float32 [T or 1, G]); x is about codes * scales. Rows do not see each other."""
    groups = -(-x.shape[1] // (fmt.block[1] or x.shape[1]))
    if fmt.scale == "static":
        if input_scale is None:
            raise ValueError("a static activation format needs its input scale")
        scale = input_scale.view(1, 1)
    else:
        width = fmt.block[1] or x.shape[1]
        padded = torch.nn.functional.pad(x, (0, groups * width - x.shape[1])).view(len(x), groups, width)
        reach = FLOAT8_MAX[fmt.element] if not fmt.is_integer else (2**fmt.bits - 1) / 2
        least = LEAST_TOKEN_SCALE if not fmt.is_integer else torch.finfo(torch.float32).eps
        scale = (padded.abs().amax(-1) / reach).clamp_(min=least)
    ratio = x / spread(scale, (x.shape[0], x.shape[1]), (1, fmt.block[1]))
    if fmt.is_integer:
        return ratio.round_().clamp_(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1), scale
    return to_float8(ratio, fmt.element).float(), scale


def _shape(q: QuantizedWeight) -> tuple[int, int]:
    return q.codes.shape[0], q.codes.shape[1]


def _extremes(w: Tensor, fmt: NumberFormat) -> tuple[Tensor, Tensor]:
    """Least and largest of each block, widened to hold 0: [R, G] each."""
    (n, c), (rows, columns) = w.shape, fmt.block
    rows, columns = min(rows or n, n), min(columns or c, c)
    padded = torch.nn.functional.pad(w, (0, -c % columns, 0, -n % rows))
    blocks = padded.view(-(-n // rows), rows, -(-c // columns), columns)
    return blocks.amin((1, 3)).clamp_(max=0), blocks.amax((1, 3)).clamp_(min=0)


def convert(weight: Tensor | QuantizedWeight, fmt: NumberFormat) -> Tensor | QuantizedWeight:
    """A matrix in the format a product wants: rounded to it, widened from it, or with one scale spread over its rows, which loses nothing.

    Errors: InternalError for other changes between quantized formats.
    """
    if not isinstance(weight, QuantizedWeight):
        return weight if fmt.is_float else quantize(weight, fmt)
    if fmt.is_float:
        return dequantize(weight)
    if weight.format == fmt:
        return weight
    if weight.format != replace(fmt, scale="tensor", block=(0, 0)) or fmt.scale != "channel":
        raise InternalError(f"weights stored as {weight.format.name} cannot become {fmt.name}")
    n = len(weight.codes)
    zero = None if weight.zero is None else weight.zero.expand(n, 1)
    return QuantizedWeight(fmt, weight.codes, weight.scale.expand(n, 1), zero, weight.order, weight.input_scale)


def narrow(q: QuantizedWeight, rows: slice, columns: slice, name: str) -> QuantizedWeight:
    """Rows and columns of a matrix. Errors: Unsupported, naming it, where a cut goes through numbers that share a scale."""
    (n, c), fmt = _shape(q), q.format
    if rows == slice(0, n) and columns == slice(0, c):
        return q
    scales = []
    for axis, part, step, size in (("outputs", rows, fmt.block[0], n), ("inputs", columns, fmt.block[1], c)):
        if step and (part.start % step or (part.stop % step and part.stop != size)):
            raise Unsupported(f"{name} has scales for {step} {axis} at a time and cannot be cut at {part.start} and {part.stop} over ranks")
        scales.append(slice(part.start // step, -(-part.stop // step)) if step else slice(None))
    if q.order is not None and columns != slice(0, c):
        raise Unsupported(f"{name} is stored with its inputs in another order (act-order), which cannot be cut over ranks")
    scale = q.scale[scales[0], scales[1]]
    return QuantizedWeight(
        fmt, q.codes[rows, columns], scale, None if q.zero is None else q.zero[scales[0], scales[1]], q.order, q.input_scale
    )
