"""Which way through a linear is fastest for how many tokens, measured here (FlashDecoding++, arXiv:2311.01282, section 5).

On the CPU both ways of our kernel sum in one order, so a choice changes no bit. The library is measured beside them, as the peer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from apportion.core.config import ModelConfig
from apportion.core.number_format import Scheme
from apportion.kernels.cpu import table_name, table_versions
from apportion.kernels.cpu.linear import PackedLinear
from apportion.kernels.interval_table import FLAT, GEMV, Intervals, IntervalTable
from apportion.kernels.ops import LinearSpec, Ops, QuantizedWeight
from apportion.kernels.reference.number_formats import quantize
from apportion.layers.linear import Linear
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
COLD_BYTES = 96 << 20  # weights that are walked through, so that each comes from memory as it does in a step: beyond a cache of 32 MiB
MOST_COPIES = 64  # a linear smaller than that share lies in a cache in a step too
ROUNDS = 15


def linears_of(folder: Path, ops: Ops, schemes: Sequence[str] = ()) -> list[LinearSpec]:
    """The distinct linears of a model, without biases; in each of `schemes` instead of their own where any are given."""
    model = cast(nn.Module, load_model(ModelConfig(model=str(folder)), read_spec(folder), ops).model)
    found = [part for module in model.modules() if isinstance(module, Linear) for part in module.specs]
    return list(dict.fromkeys(_plain(part, scheme) for scheme in schemes or ("",) for part in found))


def _plain(spec: LinearSpec, scheme: str) -> LinearSpec:
    gated = spec.gated and Scheme.parse(scheme or spec.scheme).weight.is_float
    return LinearSpec(spec.out_features, spec.in_features, scheme or spec.scheme, gated=gated)


def _copies(ops: Ops, spec: LinearSpec) -> list[PackedLinear]:
    """The same linear in several places, together too large for a cache. Errors: Unsupported for a scheme without packed kernels."""
    weight: Tensor | QuantizedWeight = torch.randn(spec.out_features, spec.in_features) * spec.in_features**-0.5
    fmt = Scheme.parse(spec.scheme).weight
    if not fmt.is_float:
        weight = quantize(weight, fmt)
    made: list[PackedLinear] = []
    for _ in range(_num_copies(spec.out_features * spec.in_features * fmt.bits // 8)):
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


def _num_copies(nbytes: int) -> int:
    return max(2, min(MOST_COPIES, -(-COLD_BYTES // max(1, nbytes))))


def _medians(calls: Sequence[Mapping[str, Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Microseconds of each way. calls: for each weight the ways to multiply it.

    The ways take turns from call to call, so a disturbance hits all, and each meets every weight in `rounds` walks over all of them, as
    cold as any other way does. One walk warms up.
    """
    names = list(calls[0])
    times: dict[str, list[float]] = {name: [] for name in names}
    for walk in range(rounds * len(names) + 1):
        for name, ways in zip(islice(cycle(names), walk, None), calls, strict=False):
            start = time.perf_counter()
            ways[name]()
            if walk:
                times[name].append((time.perf_counter() - start) * 1e6)
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def measure(
    ops: Ops, spec: LinearSpec, tokens: Sequence[int] = TOKENS, rounds: int = ROUNDS, library: bool = True
) -> dict[int, dict[str, float]]:
    """Microseconds of each way for each number of tokens: 'flat', 'gemv' where the registers hold the rows, 'library' (torch, float32).

    The library is timed apart: its float32 weights would leave the caches in another state to the way that comes next.
    """
    made = _copies(ops, spec)
    peers = [torch.randn(spec.out_features, spec.in_features) for _ in range(_num_copies(spec.out_features * spec.in_features * 4))]
    found = {}
    for t in tokens:
        x, out = torch.randn(t, spec.in_features), torch.empty(t, spec.width)
        masks = {"flat": 0} | ({"gemv": 1 << (t - 1)} if t <= made[0].gemv_rows else {})
        found[t] = _medians([{name: _forced(op, mask, x, out) for name, mask in masks.items()} for op in made], rounds)
        if library:
            torch.set_num_threads(ops.team.num_threads)  # type: ignore[attr-defined]  # as many as ours
            found[t] |= _medians([{"library": _library(x, w)} for w in peers], -(-rounds // 5))  # nothing is chosen by it
            torch.set_num_threads(1)
    return found


def _forced(op: PackedLinear, gemv: int, x: Tensor, out: Tensor) -> Callable[[], object]:
    def call() -> None:
        op.set_gemv(gemv)
        op(x, out)

    return call


def _library(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weight)


def intervals(times: Mapping[int, Mapping[str, float]]) -> Intervals:
    """Where a GEMV is taken and where the flat way; the peer's times stand beside."""
    return Intervals.fitted(times, GEMV, FLAT)


def learn(time_at: Callable[[Sequence[int]], dict[int, dict[str, float]]], tokens: Sequence[int] = TOKENS) -> Intervals:
    """Intervals from measurements at `tokens`, and at those between the two neighbours of them that choose differently."""
    times = time_at(tokens)
    while True:
        found = intervals(times)
        known = sorted(times)
        pair = next(
            (
                (a, b)
                for a, b in zip(known, known[1:], strict=False)
                if found.at(a) != found.at(b) and b - a > 1 and GEMV.kernel in times[b]
            ),
            None,
        )
        if pair is None:
            return found
        times |= time_at([sum(pair) // 2])


def worst_pick(found: Intervals) -> float:
    """Time of what is chosen over that of the best way, where it is largest among the measured numbers of tokens."""
    return max(
        us[found.at(int(tokens)).kernel] / min(time for name, time in us.items() if name != "library") for tokens, us in found.us.items()
    )


def profile_linears(
    ops: Ops, specs: Sequence[LinearSpec], rounds: int = ROUNDS, progress: Callable[[int, int], None] = lambda i, n: None
) -> IntervalTable:
    """A table of this machine for these linears."""
    rows = {}
    for index, spec in enumerate(specs):
        rows[spec.scheme, spec.out_features, spec.in_features] = learn(lambda tokens, spec=spec: measure(ops, spec, tokens, rounds))
        progress(index + 1, len(specs))
    return IntervalTable(table_name(ops.isa), table_versions() | {"torch": torch.__version__}, rows)  # type: ignore[attr-defined]
