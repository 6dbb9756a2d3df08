"""A recommendation model (DLRM, arXiv:1906.00091): embedding tables, two perceptrons, dot products between features.

Dims: b samples, l ids looked up per table, v rows of a table, m embedding, f and g features, i and o of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from apportion.core.errors import InvalidParameter
from apportion.simulator.models.builder import Builder
from apportion.simulator.ops import Model


def dlrm(
    batch: int,
    *,
    num_tables: int = 8,
    rows: int = 1_000_000,
    lookups: int = 100,
    bottom: Sequence[int] = (128, 512, 512, 512, 64),
    top: Sequence[int] = (1024, 1024, 1024, 1024, 1),
    dtype: str = "float32",
) -> Model:
    """bottom: widths from the dense features to the embedding; top: widths after the interaction, the last is the logit."""
    if top[-1] != 1:
        raise InvalidParameter(f"DLRM ends in one logit, not in {top[-1]}")
    b = Builder("dlrm", dtype)
    embedding = bottom[-1]
    x = b.input("dense", batch, bottom[0])
    clicks = b.input("clicks", batch, 1)
    for i in range(1, len(bottom)):
        x = _linear(b, f"bottom.{i - 1}", x, bottom[i])
    features = [x]
    for i in range(num_tables):
        ids = b.input(f"ids.{i}", batch, lookups, dtype="int32")
        table = b.weight(f"tables.{i}", rows, embedding)
        features.append(b.op(f"tables.{i}", "embedding_bag", "b l, v m -> b m", ids, table))
    spec = ", ".join(["b m"] * len(features)) + " -> b f m"
    x = b.op("interaction.stack", "stack", spec, *features, opaque="f", sizes={"f": len(features)})
    x = b.op("interaction.dot", "einsum", "b f m, b g m -> b f g", x, x)
    w = b.weight("top.0.linear", top[0], len(features), len(features))
    x = b.op("top.0.linear", "einsum", "b f g, o f g -> b o", x, w)
    x = b.op("top.0.relu", "relu", "b o -> b o", x)
    for i in range(1, len(top)):
        x = _linear(b, f"top.{i}", x, top[i], act=i < len(top) - 1)
    b.op("loss", "bce", "b o, b o -> ", x, clicks, scale=1 / batch)
    return b.model


def _linear(b: Builder, path: str, x: str, out: int, *, act: bool = True) -> str:
    w = b.weight(f"{path}.linear", out, b.model.tensors[x].shape[1])
    x = b.op(f"{path}.linear", "einsum", "b i, o i -> b o", x, w)
    return b.op(f"{path}.relu", "relu", "b o -> b o", x) if act else x
