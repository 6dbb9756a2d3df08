"""Where the attention scores of a model lie on text, and the unified maxima that follow (FlashDecoding++, arXiv:2311.01282, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from apportion.attention.backend import AttentionMetadata
from apportion.attention.dense import visible
from apportion.compress.walk import Walk
from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.core.model_hash import model_hash
from apportion.core.softmax_table import ABOVE, BELOW, SoftmaxTable
from apportion.kernels.dispatch import select_ops
from apportion.kernels.ops import AttentionSpec
from apportion.layers.attention import Attention
from apportion.models.checkpoint import read_spec
from apportion.models.decoder import Decoder
from apportion.models.loader import load_model
from apportion.platforms.platform import select_platform

MOST_RECOMPUTED = 0.01  # of a head's rows: with more it keeps its running maximum
EDGE = 2048  # base 2: scores beyond count as if they lay there
ROWS_AT_ONCE = 256


class RowMaxima:
    """The largest score of each row of attention, in base 2, as counts [H, 2 * EDGE] of bins one wide: floor(maximum) + EDGE."""

    def __init__(self, num_heads: int) -> None:
        self.counts = torch.zeros(num_heads, 2 * EDGE, dtype=torch.int64)

    def add(self, maxima_TH: Tensor) -> None:
        bins = maxima_TH.floor().long().clamp(-EDGE, EDGE - 1) + EDGE
        for head, column in enumerate(bins.unbind(1)):
            self.counts[head] += torch.bincount(column, minlength=2 * EDGE)

    def choose(self) -> tuple[tuple[float | None, ...], tuple[float, ...]]:
        """(phi, expected share of rows outside) of each head. The window that holds most rows, these in its middle."""
        window = int(BELOW + ABOVE)
        sums = torch.nn.functional.pad(self.counts.cumsum(1), (1, 0))
        inside = sums[:, window:] - sums[:, :-window]  # of the window that begins at a bin
        total = self.counts.sum(1)
        phi: list[float | None] = []
        for head in range(len(self.counts)):
            start = int(inside[head].argmax())
            held = self.counts[head, start : start + window].nonzero().flatten() + start - EDGE
            middle = (float(held[0]) + float(held[-1]) + 1) / 2
            phi.append(middle + (BELOW - ABOVE) / 2)
        expected = tuple((1 - inside.max(1).values.double() / total).tolist())
        return tuple(None if e > MOST_RECOMPUTED else p for p, e in zip(phi, expected, strict=True)), expected


def row_maxima(spec: AttentionSpec, qkv_TC: Tensor) -> Tensor:
    """Largest scaled score, times log2(e), that each row of one sequence sees: [T, H]. q and k as attention multiplies them."""
    heads, kv = spec.num_heads, spec.kv
    q, k = qkv_TC[:, : (heads + kv.num_kv_heads) * kv.head_dim].unflatten(1, (-1, kv.head_dim)).split([heads, kv.num_kv_heads], dim=1)
    seen = visible(len(q), kv.sliding_window)
    out = torch.empty(len(q), heads)
    for first in range(0, len(q), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        scores = torch.einsum("tkgd,skd->tkgs", q[rows].unflatten(1, (kv.num_kv_heads, -1)), k)
        out[rows] = scores.masked_fill_(~seen[rows, None, None], -torch.inf).amax(-1).flatten(1)
    return out * (spec.scale * math.log2(math.e))


@contextmanager
def _watching(layer: nn.Module, maxima: RowMaxima) -> Iterator[None]:
    """Every attention of `layer` counts its rows. Dense attention leaves q and k rotated where they stood."""
    [module] = [m for m in layer.modules() if isinstance(m, Attention)]
    run = module._run
    spec: AttentionSpec = run.__self__.spec  # type: ignore[attr-defined]

    def attend(index: int, qkv: Tensor, positions: Tensor, out: Tensor, metadata: AttentionMetadata, *norms: Tensor) -> Tensor:
        attended = run(index, qkv, positions, out, metadata, *norms)
        for first, last in pairwise(metadata.query_start_loc.tolist()):
            maxima.add(row_maxima(spec, qkv[first:last]))
        return attended

    module._run = attend
    try:
        yield
    finally:
        module._run = run


def profile_softmax(
    model: Path, tokens: Sequence[Sequence[int]], progress: Callable[[int, int], None] = lambda done, total: None
) -> SoftmaxTable:
    """Unified maxima of every head, from whole sequences of text. Errors: InvalidParameter without any; CheckpointError."""
    if not any(tokens):
        raise InvalidParameter("unified maxima are measured on text: there is none")
    spec = read_spec(model)
    loaded = load_model(ModelConfig(model=str(model)), spec, select_ops(select_platform("cpu")))
    walk = Walk(loaded, [row for row in tokens if row])
    layers = cast(Decoder, loaded.model).layers
    phi, expected = {}, {}
    for index, layer in enumerate(layers):
        maxima = RowMaxima(spec.num_heads)
        with _watching(layer, maxima):
            walk.advance(layer)
        phi[index], expected[index] = maxima.choose()
        progress(index + 1, len(layers))
    return SoftmaxTable(model_hash(model), sum(map(len, tokens)), phi, expected)
