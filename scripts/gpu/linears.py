"""Linears: bf16 against the library, low-bit ones against published times, large fp8 ones against torch._scaled_mm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from machine import PEERS, Machine, OutOfTime, geomean, row
from shapes import FEW_ROWS, LARGE_ROWS, LINEAR_ROWS, LINEAR_SHAPES, QUANTIZED

from apportion.core.number_format import Scheme
from apportion.kernels.interval_table import Choice, Intervals, IntervalTable, device_slug
from apportion.kernels.ops import LinearSpec
from apportion.kernels.reference.number_formats import quantize
from apportion.kernels.triton.linear import SPLITS, choose_splits, flat


def linear(machine: Machine) -> dict[str, Any]:
    """bf16 products of few tokens: every tile and split of the flat kernel against the library, weights rotated past the cache."""
    rows, points = [], {}
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
    versions = {name: machine.facts[name] for name in ("torch", "triton")}
    table = IntervalTable(device_slug(machine.facts["name"]), versions, {key: Intervals.of(found) for key, found in points.items()})
    speedups = [r["peer_us"] / r["us"] for r in rows if 2 <= r["t"] <= 16]
    return {"rows": rows, "geomean_2_to_16": geomean(speedups), "worst_2_to_16": min(speedups, default=None), "table": table.as_dict()}


def quantized(machine: Machine) -> dict[str, Any]:
    """Low-bit products of few tokens through kernels.ops, the rounding of inputs inside, weights rotated past the cache."""
    rows: list[dict[str, Any]] = []
    try:
        for scheme, name, shapes in QUANTIZED:
            bits = Scheme.parse(scheme).weight.bits
            for n, c in shapes[: machine.shrunk(99, 1)]:
                n, c = machine.shrunk(n, 128), machine.shrunk(c, 128)
                ops = _copies(machine, scheme, n, c, machine.copies(n * c * bits // 8))
                for t in FEW_ROWS[: machine.shrunk(99, 1)]:
                    x, floor = machine.random(t, c), machine.floor_us(n * c * bits / 8 + 2 * t * (n + c))
                    us = machine.microseconds([partial(op, x) for op in ops])
                    published = PEERS["linear"].get(name, {}).get(f"{n}x{c}", {}).get(str(t))
                    rows.append(row(f"{scheme} {n}x{c} T={t}", us, floor, published))
    except OutOfTime:
        pass
    return {
        "rows": rows,
        "peer": PEERS["source"]["how"],
        "inputs": "float32 or bfloat16 as the engine gives them; their rounding is inside",
    }


def large(machine: Machine) -> dict[str, Any]:
    """fp8 products of many tokens through kernels.ops against torch._scaled_mm of inputs that are rounded already."""
    rows: list[dict[str, Any]] = []
    n, c = machine.shrunk(8192, 128), machine.shrunk(8192, 128)
    try:
        ops = _copies(machine, "e4m3_channel@e4m3_token", n, c, machine.copies(n * c))
        one = torch.ones((), device=machine.device)
        for t in LARGE_ROWS[: machine.shrunk(99, 1)]:
            x = machine.random(t, c)
            us = machine.microseconds([partial(op, x) for op in ops])
            library = None
            if not machine.dry:  # which has no such product without a GPU
                codes, weights = x.to(torch.float8_e4m3fn), [machine.random(n, c).to(torch.float8_e4m3fn).t() for _ in ops]
                library = machine.microseconds(
                    [partial(torch._scaled_mm, codes, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16) for w in weights]
                )
            floor = max(machine.floor_us(n * c + 2 * t * (n + c)), t * n * c / machine.facts["flop_per_s"] * 1e6)  # twice the rate of bf16
            rows.append(row(f"fp8 {n}x{c} T={t}", us, floor, library))
    except OutOfTime:
        pass
    return {"rows": rows, "inputs": "ours rounds them, the library's are rounded before"}


def _copies(machine: Machine, scheme: str, n: int, c: int, count: int) -> list[Any]:
    """The same linear in several places."""
    weight = quantize(torch.randn(n, c) * c**-0.5, Scheme.parse(scheme).weight)
    if scheme.endswith("static"):
        weight.input_scale = torch.full((1,), 0.01)
    made: list[Any] = []
    for _ in range(count):
        op = machine.ops.linear(LinearSpec(n, c, scheme))
        buffer = torch.empty(op.nbytes, dtype=torch.uint8, device=machine.device)
        op.bind(buffer if not made else made[0][1].clone())
        if not made:
            op.load_rows(weight, 0)
        made.append((op, buffer))
    return [op for op, _ in made]
