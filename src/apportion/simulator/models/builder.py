"""Writes an `ops.Model` operator by operator; works out dims, types and shapes, and names the path where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.simulator.ops import ITEMSIZE, Dim, Model, Op, Operand, Tensor

BATCH = "b"  # the dim of this name is the batch, in every operator


class Builder:
    def __init__(self, name: str, dtype: str) -> None:
        if dtype not in ITEMSIZE:
            raise InvalidParameter(f"dtype {dtype!r} of model {name!r} is none of {', '.join(ITEMSIZE)}")
        self.model = Model(name)
        self.dtype = dtype

    def input(self, name: str, *shape: int, dtype: str | None = None) -> str:
        return self._tensor(name, shape, dtype or self.dtype, "input")

    def weight(self, path: str, *shape: int) -> str:
        return self._tensor(f"{path}.weight", shape, self.dtype, "weight")

    def op(
        self,
        path: str,
        kind: str,
        spec: str,
        *inputs: str,
        opaque: str = "",
        sizes: Mapping[str, int] | None = None,
        dtype: str | None = None,
        **attrs: Any,
    ) -> str:
        """Append one operator and return its output tensor, named by the path. sizes: of dims that no input has; dtype: if another."""
        left, _, right = spec.partition("->")
        reads = [_names(part) for part in left.split(",")]
        extents = self._extents(path, inputs, reads, sizes or {})
        out = _names(right)
        if unknown := [name for name in out if str(name) not in extents]:
            raise InvalidParameter(f"output dims {unknown} of {path!r} have no extent")
        dims = {name: (extent, _type(name, out, opaque.split())) for name, extent in extents.items()}
        if path in self.model.ops:
            raise InvalidParameter(f"two operators have the path {path!r}")
        operands = tuple(Operand(tensor, names) for tensor, names in zip(inputs, reads, strict=True))
        self.model.ops[path] = Op(path, kind, dims, operands, (Operand(path, out),), attrs)
        return self._tensor(path, tuple(extents[str(name)] for name in out), dtype or self.dtype, "activation")

    def _extents(
        self, path: str, inputs: Sequence[str], reads: Sequence[tuple[str | None, ...]], sizes: Mapping[str, int]
    ) -> dict[str, int]:
        extents = dict(sizes)
        for tensor, names in zip(inputs, reads, strict=True):
            shape = self.model.tensors[tensor].shape
            if len(shape) != len(names):
                raise InvalidParameter(f"{path!r} reads {tensor!r} of shape {shape} as {len(names)} dims")
            for name, extent in zip(names, shape, strict=True):
                if name is not None and extents.setdefault(name, extent) != extent:
                    raise InvalidParameter(f"dim {name!r} of {path!r} is {extents[name]}, but {extent} in {tensor!r}")
        return extents

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str, kind: str) -> str:
        if any(extent < 1 for extent in shape):
            raise InvalidParameter(f"tensor {name!r} has an empty shape {shape}")
        self.model.tensors[name] = Tensor(name, shape, dtype, kind)
        return name


def _names(part: str) -> tuple[str | None, ...]:
    return tuple(None if name == "_" else name for name in part.split())


def _type(name: str, out: tuple[str | None, ...], opaque: list[str]) -> Dim:
    if name in opaque:
        return Dim.OPAQUE
    if name == BATCH:
        return Dim.BATCH
    return Dim.OTHER if name in out else Dim.REDUCE
