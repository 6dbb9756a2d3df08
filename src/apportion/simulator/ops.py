"""What a model computes: tensors, and operators over named iteration dims. Knows nothing of devices.

An operator is written like an einsum, "b s m, f m -> b s f": every name is a dim of the ITERATION space, in which work is cut (Proteus,
section 4.1). '_' is an axis of a tensor that every part needs whole. A dim is BATCH (cut into micro-batches too), OTHER, REDUCE (absent
from the output: parts hold partial sums) or OPAQUE (cannot be cut: a softmax axis, a window). Backward operators live in the iteration
space of their forward operator; whether THEIR outputs are partial follows from which dims the output lacks, by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from apportion.core.config import DTYPES
from apportion.core.errors import InvalidParameter

ITEMSIZE = {**DTYPES, "float8_e4m3fn": 1, "int32": 4, "bool": 1}


class Dim(StrEnum):
    BATCH = "batch"
    OTHER = "other"
    REDUCE = "reduce"
    OPAQUE = "opaque"


@dataclass(frozen=True)
class Tensor:
    """kind: input (data: present wherever it is read), weight, activation."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Operand:
    """A tensor as an operator sees it: per axis the iteration dim, None where every part needs the whole axis."""

    tensor: str
    dims: tuple[str | None, ...]


@dataclass(frozen=True)
class Op:
    """dims: name -> (extent, type), in a fixed order. attrs: numbers that the kernel needs beside shapes (stride, scale, ...)."""

    path: str
    kind: str
    dims: Mapping[str, tuple[int, Dim]]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Model:
    """ops: in program order; paths are dotted. Weights are named '<path>.weight' or by whom they are shared."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    ops: dict[str, Op] = field(default_factory=dict)

    @cached_property
    def consumers(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in self.tensors}
        for op in self.ops.values():
            for operand in op.inputs:
                if op.path not in found[operand.tensor]:
                    found[operand.tensor].append(op.path)
        return found

    @cached_property
    def producer(self) -> dict[str, str]:
        return {operand.tensor: op.path for op in self.ops.values() for operand in op.outputs}

    @cached_property
    def differentiable(self) -> frozenset[str]:
        """Weights and what they flow into, as far as no operator says `stop_gradient`."""
        found = {t.name for t in self.tensors.values() if t.kind == "weight"}
        for op in self.ops.values():
            if not op.attrs.get("stop_gradient") and any(operand.tensor in found for operand in op.inputs):
                found |= {operand.tensor for operand in op.outputs}
        return frozenset(found)


# What a backward operator reads beside the output's gradient: "i" all inputs, "o" the output, digits single inputs.
SAVED = {
    "relu": "o", "gelu": "0", "silu_mul": "0", "layer_norm": "01", "rms_norm": "01", "embedding": "0", "embedding_bag": "0",
    "attention": "0", "cross_entropy": "i", "bce": "i", "max_pool": "0", "avg_pool": "", "scale_shift": "01", "stack": "", "concat": "",
    "route": "0", "scores": "0", "softmax": "o", "attend": "01",
}  # fmt: skip
LOSSES = ("cross_entropy", "bce")


def backward(model: Model, op: Op) -> list[Op]:
    """The operators that produce the gradients of op's inputs; each output operand carries the name of the tensor it is a gradient OF.

    An `add` has none for operands as large as its output: the gradient passes through (`passes_through`). Contractions split into one
    operator per input, as frameworks do; everything else is one fused backward kernel.
    """
    (out,) = op.outputs
    if out.tensor not in model.differentiable:
        return []
    wrt = [i for i, operand in enumerate(op.inputs) if operand.tensor in model.differentiable]
    grad_out = Operand(gradient(out.tensor), out.dims)
    if op.kind in ("einsum", "conv2d", "add"):
        return [_contraction_gradient(op, i, grad_out) for i in wrt if i not in passes_through(op)]
    if op.kind not in SAVED:
        raise InvalidParameter(f"no gradient is known for operator kind {op.kind!r} of {op.path!r}")
    if not wrt:
        return []
    saved = [op.inputs[i] for i in range(len(op.inputs)) if "i" in SAVED[op.kind] or str(i) in SAVED[op.kind]]
    saved += [out] if "o" in SAVED[op.kind] else []
    reads = tuple(saved) + (() if op.kind in LOSSES else (grad_out,))
    attrs = {**op.attrs, "wrt": tuple(wrt)}
    return [Op(f"{op.path}.grad", f"{op.kind}.grad", op.dims, reads, tuple(op.inputs[i] for i in wrt), attrs)]


def passes_through(op: Op) -> list[int]:
    """Inputs whose gradient IS the output's gradient."""
    return [i for i, operand in enumerate(op.inputs) if op.kind == "add" and operand.dims == op.outputs[0].dims]


def _contraction_gradient(op: Op, i: int, grad_out: Operand) -> Op:
    others = () if op.kind == "add" else op.inputs[:i] + op.inputs[i + 1 :]
    kind = "einsum" if op.kind != "conv2d" else f"conv2d.grad{i}"
    return Op(f"{op.path}.grad{i}", kind, op.dims, (*others, grad_out), (op.inputs[i],), op.attrs)


def gradient(tensor: str) -> str:
    return f"grad:{tensor}"
