"""Which way through a linear is fastest for how many tokens, measured here (FlashDecoding++, arXiv:2311.01282, section 5).

On the CPU both ways of our kernel sum in one order, so a choice changes no bit. The library is measured beside them, as the peer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from apportion.core.config import ModelConfig
from apportion.core.number_format import Scheme
from apportion.kernels.cpu import VERSIONS, table_name
from apportion.kernels.cpu.linear import PackedLinear
from apportion.kernels.interval_table import FLAT, GEMV, Choice, Intervals, IntervalTable
from apportion.kernels.ops import LinearSpec, Ops, QuantizedWeight
from apportion.kernels.reference.number_formats import quantize
from apportion.layers.linear import Linear
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
COLD_BYTES = 64 << 20  # weights that are rotated, so that each comes from memory as it does in a step
MOST_COPIES = 16
ROUNDS = 9


def linears_of(folder: Path, ops: Ops) -> list[LinearSpec]:
    """The distinct linears of a model, without biases."""
    model = cast(nn.Module, load_model(ModelConfig(model=str(folder)), read_spec(folder), ops).model)
    found = [part for module in model.modules() if isinstance(module, Linear) for part in module.specs]
    return list(dict.fromkeys(LinearSpec(s.out_features, s.in_features, s.scheme, gated=s.gated) for s in found))


def _copies(ops: Ops, spec: LinearSpec) -> list[PackedLinear]:
    """The same linear in several places, together too large for a cache. Errors: Unsupported for a scheme without packed kernels."""
    weight: Tensor | QuantizedWeight = torch.randn(spec.out_features, spec.in_features) * spec.in_features**-0.5
    fmt = Scheme.parse(spec.scheme).weight
    if not fmt.is_float:
        weight = quantize(weight, fmt)
    made: list[PackedLinear] = []
    for _ in range(max(2, min(MOST_COPIES, -(-COLD_BYTES // (spec.out_features * spec.in_features * fmt.bits // 8))))):
        op = PackedLinear(ops.team, spec)  # type: ignore[attr-defined]
        buffer = torch.empty(op.nbytes + 256, dtype=torch.uint8)
        start = -buffer.data_ptr() % 256
        op.bind(buffer[start : start + op.nbytes])
        if made:
            made[0].copy_to(op)
        else:
            op.load_rows(weight, 0)
        made.append(op)
    return made


def _medians(ways: Mapping[str, Sequence[Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Microseconds of a call of each way, rounds of all ways in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, calls in ways.items():
            start = time.perf_counter()
            for call in calls:
                call()
            if round_:
                times[name].append((time.perf_counter() - start) / len(calls) * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(
    ops: Ops, spec: LinearSpec, tokens: Sequence[int] = TOKENS, rounds: int = ROUNDS, library: bool = True
) -> dict[int, dict[str, float]]:
    """Microseconds of each way for each number of tokens: 'flat', 'gemv' where the registers hold the rows, 'library' (torch, float32)."""
    made = _copies(ops, spec)
    peers = [torch.randn(spec.out_features, spec.in_features) for _ in made] if library else []
    found = {}
    for t in tokens:
        x, out = torch.randn(t, spec.in_features), torch.empty(t, spec.width)
        ways: dict[str, list[Callable[[], object]]] = {"flat": [_forced(op, 0, x, out) for op in made]}
        if t <= made[0].gemv_rows:
            ways["gemv"] = [_forced(op, 1 << (t - 1), x, out) for op in made]
        if library:
            ways["library"] = [_library(x, w) for w in peers]
        found[t] = _medians(ways, rounds)
    return found


def _forced(op: PackedLinear, gemv: int, x: Tensor, out: Tensor) -> Callable[[], object]:
    def call() -> None:
        op.set_gemv(gemv)
        op(x, out)

    return call


def _library(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weight)


def intervals(times: Mapping[int, Mapping[str, float]]) -> Intervals:
    """Flat wherever a GEMV does not win beyond the noise; the peer's times stand beside."""
    points: list[tuple[int, float, float, Choice]] = [
        (t, us["flat"], us.get("gemv", float("inf")), GEMV) for t, us in sorted(times.items()) if "gemv" in us
    ]
    points += [(t, us["flat"], us["flat"], FLAT) for t, us in sorted(times.items()) if "gemv" not in us]
    return Intervals.of(points, FLAT, {t: {"library": us["library"]} for t, us in times.items() if "library" in us})


def profile_linears(
    ops: Ops, specs: Sequence[LinearSpec], rounds: int = ROUNDS, progress: Callable[[int, int], None] = lambda i, n: None
) -> IntervalTable:
    """A table of this machine for these linears."""
    rows = {}
    for index, spec in enumerate(specs):
        rows[spec.scheme, spec.out_features, spec.in_features] = intervals(measure(ops, spec, rounds=rounds))
        progress(index + 1, len(specs))
    return IntervalTable(table_name(ops.isa), VERSIONS | {"torch": torch.__version__}, rows)  # type: ignore[attr-defined]
