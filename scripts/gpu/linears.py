"""Linears: bf16 against the library, low-bit ones against published times, large fp8 ones against torch._scaled_mm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from machine import PEERS, Machine, OutOfTime, geomean, row
from shapes import FEW_ROWS, LARGE_ROWS, LINEAR_ROWS, LINEAR_SHAPES, QUANTIZED

from apportion.core.number_format import Scheme
from apportion.kernels.interval_table import LIBRARY, Choice, Intervals, IntervalTable, device_slug
from apportion.kernels.ops import LinearSpec
from apportion.kernels.reference.number_formats import quantize
from apportion.kernels.triton.linear import SPLITS, choose_splits, flat
from apportion.kernels.triton.quantized import CodedLinear, library_obstacle

Points = dict[tuple[str, int, int], list[tuple[int, float, float, Choice]]]  # as Intervals.of takes them


def linear(machine: Machine) -> dict[str, Any]:
    """bf16 products of few tokens: every tile and split of the flat kernel against the library, weights rotated past the cache."""
    rows: list[dict[str, Any]] = []
    points: Points = {}
    tiles = machine.ops.tiles.flat[: machine.shrunk(99, 1)]
    try:
        for n, c in LINEAR_SHAPES[: machine.shrunk(99, 1)]:
            n, c = machine.shrunk(n, 128), machine.shrunk(c, 64)
            weights = [machine.random(n, c) for _ in range(machine.copies(2 * n * c))]
            measured: list[tuple[int, float, float, Choice]] = []
            for t in LINEAR_ROWS[: machine.shrunk(99, 2)]:
                x, out = machine.random(t, c), torch.empty(t, n, device=machine.device, dtype=torch.bfloat16)
                library = machine.microseconds([partial(F.linear, x, w) for w in weights])
                best, choice = float("inf"), Choice("flat")
                for index, tile in enumerate(tiles):
                    filling = choose_splits(n, c, machine.facts["multiprocessors"], tile)
                    for splits in sorted({1, filling, *(SPLITS if n <= 4096 and not machine.dry else ())}):
                        us = machine.microseconds([partial(flat, x, w, None, out, splits, tile) for w in weights])
                        if us < best:
                            best, choice = us, Choice("flat", index, splits)
                measured.append((t, library, best, choice))
                floor, published = machine.floor_us(2 * (n * c + t * (n + c))), PEERS["linear"]["bfloat16"].get(f"{n}x{c}", {}).get(str(t))
                rows.append(
                    row(f"bf16 {n}x{c} T={t}", best, floor, library, t=t, tile=choice.tile, splits=choice.splits, published_us=published)
                )
            points["bfloat16", n, c] = measured
            del weights
    except OutOfTime:
        pass  # shapes that are whole make a table
    speedups = [r["peer_us"] / r["us"] for r in rows if 2 <= r["t"] <= 16]
    return {
        "rows": rows,
        "geomean_2_to_16": geomean(speedups),
        "worst_2_to_16": min(speedups, default=None),
        "table": _table(machine, points).as_dict(),
    }


def _table(machine: Machine, points: Points) -> IntervalTable:
    versions = {name: machine.facts[name] for name in ("torch", "triton")}
    return IntervalTable(device_slug(machine.facts["name"]), versions, {key: Intervals.of(found) for key, found in points.items()})


def quantized(machine: Machine) -> dict[str, Any]:
    """Low-bit products of few tokens, the rounding of inputs inside, weights rotated past the cache: every tile, and the library's."""
    rows: list[dict[str, Any]] = []
    points: Points = {}
    try:
        for scheme, name, shapes in QUANTIZED:
            bits = Scheme.parse(scheme).weight.bits
            for n, c in shapes[: machine.shrunk(99, 1)]:
                n, c = machine.shrunk(n, 128), machine.shrunk(c, 128)
                linears = _Copies(machine, scheme, n, c)
                for t in FEW_ROWS[: machine.shrunk(99, 1)]:
                    us, choice, library = linears.best(t)
                    floor, published = (
                        machine.floor_us(n * c * bits / 8 + 2 * t * (n + c)),
                        PEERS["linear"].get(name, {}).get(f"{n}x{c}", {}),
                    )
                    rows.append(row(f"{scheme} {n}x{c} T={t}", us, floor, published.get(str(t)), choice=str(choice), library_us=library))
                    if library is not None:
                        points.setdefault((scheme, n, c), []).append((t, library, us, choice))
    except OutOfTime:
        pass
    return {"rows": rows, "peer": PEERS["source"]["how"], "table": _table(machine, points).as_dict()}


def large(machine: Machine) -> dict[str, Any]:
    """fp8 products of many tokens, the rounding of inputs inside: our kernel, the library through ours, and torch._scaled_mm alone."""
    rows: list[dict[str, Any]] = []
    points: Points = {}
    scheme, n, c = "e4m3_channel@e4m3_token", machine.shrunk(8192, 128), machine.shrunk(8192, 128)
    try:
        linears = _Copies(machine, scheme, n, c)
        one = torch.ones((), device=machine.device)
        for t in LARGE_ROWS[: machine.shrunk(99, 1)]:
            us, choice, library = linears.best(t)
            alone = None
            if library is not None:
                codes, weights = (
                    machine.random(t, c).to(torch.float8_e4m3fn),
                    [machine.random(n, c).to(torch.float8_e4m3fn).t() for _ in linears.ops],
                )
                alone = machine.microseconds(
                    [partial(torch._scaled_mm, codes, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16) for w in weights]
                )
                points.setdefault((scheme, n, c), []).append((t, library, us, choice))
            floor = max(machine.floor_us(n * c + 2 * t * (n + c)), t * n * c / machine.facts["flop_per_s"] * 1e6)  # twice the rate of bf16
            dispatched = us if library is None else min(us, library)
            rows.append(row(f"fp8 {n}x{c} T={t}", dispatched, floor, alone, flat_us=us, library_us=library))
    except OutOfTime:
        pass
    return {"rows": rows, "peer": "torch._scaled_mm of inputs rounded before; ours rounds them", "table": _table(machine, points).as_dict()}


class _Copies:
    """One quantized linear in several places, what multiplies it in our hands."""

    def __init__(self, machine: Machine, scheme: str, n: int, c: int) -> None:
        self.machine, self.choice = machine, Choice("flat")
        spec, bits = LinearSpec(n, c, scheme), Scheme.parse(scheme).weight.bits
        self.has_library = not machine.dry and not library_obstacle(spec, machine.ops.units)
        weight = quantize(torch.randn(n, c) * c**-0.5, Scheme.parse(scheme).weight)
        if scheme.endswith("static"):
            weight.input_scale = torch.full((1,), 0.01)
        self.ops: list[CodedLinear] = []
        for _ in range(machine.copies(n * c * bits // 8)):
            op = CodedLinear(spec, machine.ops.tiles.flat, machine.ops.units, lambda rows: self.choice, self.has_library)
            op.bind(torch.empty(op.nbytes, dtype=torch.uint8, device=machine.device))
            op.load_rows(weight, 0)
            self.ops.append(op)

    def best(self, t: int) -> tuple[float, Choice, float | None]:
        """(microseconds of our kernel in its best tile, that tile, the library's) for t tokens. Errors: OutOfTime."""
        op, x = self.ops[0], self.machine.random(t, self.ops[0].spec.in_features)
        found = []
        for index, tile in enumerate(op.tiles[: self.machine.shrunk(99, 1)]):
            filling = choose_splits(op.spec.out_features, op.spec.in_features, self.machine.facts["multiprocessors"], tile)
            for splits in sorted({1, filling}):
                found.append((self._time(x, Choice("flat", index, splits)), index, splits))
        us, index, splits = min(found)
        return us, Choice("flat", index, splits), self._time(x, LIBRARY) if self.has_library else None

    def _time(self, x: torch.Tensor, choice: Choice) -> float:
        self.choice = choice
        return self.machine.microseconds([partial(op, x) for op in self.ops])
