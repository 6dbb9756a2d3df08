"""Linears and experts in plain torch: floating point row by row, every other format as packed codes that a call dequantizes in panels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apportion.core.errors import InternalError
from apportion.core.number_format import Scheme
from apportion.kernels.ops import ExpertsSpec, Linear, LinearSpec, QuantizedWeight, Rounding
from apportion.kernels.reference import number_formats
from apportion.kernels.reference.number_formats import TORCH_DTYPES, pack, spread, unpack

PANEL_NUMBERS = 1 << 21  # weights that a call holds dequantized at a time
PROJECTIONS = ("gate", "up", "down")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


class ReferenceLinear:
    """kernels/ops.Linear in floating point. Buffer: the weight [N, C], then (256-byte aligned) the bias float32 [N]."""

    rounding = None

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self._dtype = TORCH_DTYPES[spec.scheme]
        self._bias_start = _aligned(spec.out_features * spec.in_features * self._dtype.itemsize)
        self.nbytes = self._bias_start + (_aligned(spec.out_features * 4) if spec.bias else 0)

    def bind(self, buffer: Tensor) -> None:
        n, c = self.spec.out_features, self.spec.in_features
        self._weight = buffer[: n * c * self._dtype.itemsize].view(self._dtype).view(n, c)
        self._bias: Any = buffer[self._bias_start : self._bias_start + 4 * n].view(torch.float32) if self.spec.bias else None

    def load_rows(self, weight: Tensor, row: int) -> None:
        self._weight[row : row + weight.shape[0]].copy_(weight)

    def load_bias(self, bias: Tensor, row: int) -> None:
        self._bias[row : row + bias.shape[0]].copy_(bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = F.linear(x, self._weight.float(), self._bias)
        if self.spec.gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if out is None else out.copy_(y)

    def rows(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        found = self._weight.index_select(0, ids.long()).float()
        return found if out is None else out.copy_(found)


class DequantizedLinear:
    """kernels/ops.Linear of any quantized scheme over a float32 linear of the same kernels, `make_linear`.

    Buffer, each part 256-byte aligned: codes packed as words row by row, scales in the format's dtype, zeros, order int32 [C], the static
    input scale, bias float32 [N]. A call dequantizes panels of rows into the float32 linear. Where the input is rounded, codes multiply
    codes (products of 8-bit numbers are exact in float32) and scales come after, as hardware does it.
    """

    rounding: Rounding | None = None

    def __init__(self, spec: LinearSpec, make_linear: Callable[[LinearSpec], Linear]) -> None:
        self.spec = spec
        self.scheme = Scheme.parse(spec.scheme)
        self._make_linear = make_linear
        fmt, n, c = self.scheme.weight, spec.out_features, spec.in_features
        scales = fmt.scale_shape(n, c)
        scale_dtype = TORCH_DTYPES[fmt.scale_dtype]
        words = -(-c * fmt.bits // 32)
        parts: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("codes", torch.int32, (n, words)), ("scale", scale_dtype, scales)]
        if fmt.zero != "none":
            parts.append(("zero", scale_dtype if fmt.zero == "min" else torch.uint8, scales))
        if fmt.permuted:
            parts.append(("order", torch.int32, (c,)))
        if self.scheme.activation is not None and self.scheme.activation.scale == "static":
            parts.append(("input_scale", torch.float32, (1,)))
        if spec.bias:
            parts.append(("bias", torch.float32, (n,)))
        self.parts, self.nbytes = [], 0
        for name, dtype, shape in parts:
            self.parts.append((name, self.nbytes, dtype, shape))
            self.nbytes += _aligned(torch.Size(shape).numel() * dtype.itemsize)
        step = fmt.block[0] or n
        self._panel = min(n, max(1, PANEL_NUMBERS // max(c, 1) // step) * step)

    def bind(self, buffer: Tensor) -> None:
        self._stored = {}
        for name, start, dtype, shape in self.parts:
            count = torch.Size(shape).numel()
            self._stored[name] = buffer[start : start + count * dtype.itemsize].view(dtype).view(shape)

    def load_rows(self, weight: QuantizedWeight, row: int) -> None:
        fmt = self.scheme.weight
        if not isinstance(weight, QuantizedWeight) or weight.format != fmt:
            given = weight.format.name if isinstance(weight, QuantizedWeight) else "floating point"
            raise InternalError(f"a linear of {fmt.name} was given rows in {given}")
        step = fmt.block[0] or self.spec.out_features
        if row % step:
            raise InternalError(f"rows of {fmt.name} must start at a multiple of {step}, not at {row}")
        n = len(weight.codes)
        self._stored["codes"][row : row + n] = self.pack(weight.codes)
        first = row // step
        self._stored["scale"][first : first + len(weight.scale)] = weight.scale
        for name, value in (("zero", weight.zero), ("order", weight.order), ("input_scale", weight.input_scale)):
            if (name in self._stored) != (value is not None):
                raise InternalError(f"rows for {self.spec.scheme} {'lack' if value is None else 'have'} {name}")
        if weight.zero is not None:
            self._stored["zero"][first : first + len(weight.zero)] = weight.zero
        if weight.order is not None:
            self._stored["order"].copy_(weight.order)
        if weight.input_scale is not None:
            self._stored["input_scale"].copy_(weight.input_scale)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [n, C] -> words [n, W] as they are stored."""
        return pack(codes, self.scheme.weight.bits)

    def unpack(self, words: Tensor) -> Tensor:
        return unpack(words, self.scheme.weight.bits, self.spec.in_features)

    def load_bias(self, bias: Tensor, row: int) -> None:
        self._stored["bias"][row : row + bias.shape[0]].copy_(bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(x.shape[0], self.spec.out_features, device=x.device)
        if self.scheme.weight.permuted:
            x = x.index_select(1, self._stored["order"].long())
        if self.scheme.activation is not None:
            x, x_scale = number_formats.quantize_activation(x, self.scheme.activation, self._stored.get("input_scale"))
        for first in range(0, self.spec.out_features, self._panel):
            rows = slice(first, min(first + self._panel, self.spec.out_features))
            panel = self._rows(rows)
            if self.scheme.activation is None:
                y = self._product(x, _dequantize_columns(panel))
            else:
                y = self._rounded_product(x, x_scale, panel)
            out[:, rows] = y + self._stored["bias"][rows] if self.spec.bias else y
        return out

    def rows(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        wanted, fmt = ids.long(), self.scheme.weight
        step = fmt.block[0] or self.spec.out_features
        if step == 1:
            codes = self.unpack(self._stored["codes"].index_select(0, wanted))
            zero = self._stored["zero"].index_select(0, wanted) if fmt.zero != "none" else None
            scale = self._stored["scale"].index_select(0, wanted).float()
            zero = zero.float() if zero is not None and fmt.zero == "min" else zero
            gathered = number_formats.dequantize(QuantizedWeight(fmt, codes, scale, zero, self._stored.get("order")))
            return gathered if out is None else out.copy_(gathered)
        found = torch.empty(len(ids), self.spec.in_features, device=ids.device) if out is None else out
        for block in (wanted // step).unique().tolist():
            here = (wanted // step == block).nonzero()[:, 0]
            dense = number_formats.dequantize(self._rows(slice(block * step, min(block * step + step, self.spec.out_features))))
            found[here] = dense[wanted[here] - block * step]
        return found

    def _rows(self, rows: slice) -> QuantizedWeight:
        """Rows [a, b) as they were loaded; a is a multiple of the block."""
        fmt = self.scheme.weight
        step = fmt.block[0] or self.spec.out_features
        scales = slice(rows.start // step, -(-rows.stop // step))
        zero = self._stored["zero"][scales] if fmt.zero != "none" else None
        if fmt.zero == "min" and zero is not None:
            zero = zero.float()
        codes = self.unpack(self._stored["codes"][rows])
        return QuantizedWeight(fmt, codes, self._stored["scale"][scales].float(), zero, self._stored.get("order"))

    def _rounded_product(self, x: Tensor, x_scale: Tensor, panel: QuantizedWeight) -> Tensor:
        """sum over groups of (codes of x . codes of w) * scale of x * scale of w; one group unless both have several scales to a row."""
        if panel.scale.shape[1] == 1 and x_scale.shape[1] == 1 and panel.format.zero == "none":
            return (
                self._product(x, number_formats.decode(panel)) * x_scale * spread(panel.scale, (len(panel.codes), 1), panel.format.block).T
            )
        if x_scale.shape[1] == 1:
            return self._product(x, _dequantize_columns(panel)) * x_scale
        width = self.scheme.activation.block[1] if self.scheme.activation else 0
        if panel.format.block[1] not in (0, width) or panel.format.zero != "none":
            raise InternalError(f"{self.spec.scheme} has groups of inputs that differ between weight and activation")
        codes = number_formats.decode(panel)
        scale = spread(panel.scale, (len(panel.codes), panel.scale.shape[1]), (panel.format.block[0], 1))
        y = torch.zeros(len(x), len(codes))
        for g in range(x_scale.shape[1]):
            part = self._product(x[:, g * width : (g + 1) * width], codes[:, g * width : (g + 1) * width])
            y += part * x_scale[:, g, None] * scale[:, min(g, scale.shape[1] - 1)]
        return y

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        linear = self._make_linear(LinearSpec(*weight.shape))
        storage = torch.empty(linear.nbytes + 256, dtype=torch.uint8)
        start = -storage.data_ptr() % 256
        linear.bind(storage[start : start + linear.nbytes])
        linear.load_rows(weight, 0)
        return linear(x)


def _dequantize_columns(panel: QuantizedWeight) -> Tensor:
    """As `dequantize`, the columns left in the order they are stored in."""
    return number_formats.dequantize(QuantizedWeight(panel.format, panel.codes, panel.scale, panel.zero))


class ReferenceExperts:
    """kernels/ops.Experts of any schemes as three linears for each expert, of the kernels that make_linear and silu_mul belong to."""

    def __init__(self, spec: ExpertsSpec, make_linear: Callable[[LinearSpec], Linear], silu_mul: Callable[[Tensor], Tensor]) -> None:
        self.spec = spec
        self._silu_mul = silu_mul
        shapes = ((spec.ffn, spec.hidden), (spec.ffn, spec.hidden), (spec.hidden, spec.ffn))
        self._linears = [
            dict(
                zip(
                    PROJECTIONS,
                    (make_linear(LinearSpec(*shape, s)) for shape, s in zip(shapes, spec.schemes_of(e), strict=True)),
                    strict=True,
                )
            )
            for e in range(spec.num_experts)
        ]
        self.nbytes = sum(_aligned(linear.nbytes) for expert in self._linears for linear in expert.values())

    def bind(self, buffer: Tensor) -> None:
        start = 0
        for expert in self._linears:
            for linear in expert.values():
                linear.bind(buffer[start : start + linear.nbytes])
                start += _aligned(linear.nbytes)

    def load(self, expert: int, projection: str, weight: Tensor | QuantizedWeight, row: int = 0) -> None:
        self._linears[expert][projection].load_rows(weight, row)

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        parts = x.new_zeros(*expert_ids.shape, self.spec.hidden)
        for expert in expert_ids.unique().tolist():
            if expert < 0:
                continue
            token, choice = (expert_ids == expert).nonzero(as_tuple=True)
            gate_up = x.new_empty(len(token), 2 * self.spec.ffn)
            chosen, linears = x[token], self._linears[expert]
            linears["gate"](chosen, gate_up[:, : self.spec.ffn])
            linears["up"](chosen, gate_up[:, self.spec.ffn :])
            parts[token, choice] = linears["down"](self._silu_mul(gate_up))
        y = x.new_zeros(len(x), self.spec.hidden)
        for choice in range(expert_ids.shape[1]):  # one after the other: the order of the sum is part of the contract
            y += parts[:, choice] * expert_weights[:, choice, None]
        return y
