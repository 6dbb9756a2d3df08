"""Fused operators put into a plain model by torch.compile (kernels/fx_fusion) against the same operators called by hand, and eager torch.

python benchmarks/fx_fusion.py -o benchmarks/results/FILE.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from apportion.bench.kernels import make_ops
from apportion.kernels.fx_fusion import fusing
from apportion.kernels.ops import Ops
from apportion.platforms.cpu import processor_name

LAYERS, WIDTH, FFN, EPS = 8, 1024, 2816, 1e-5  # of bench-250m; a product stands in for attention
ROWS = (1, 8, 64, 512)
SECONDS = 1.0


class Plain(nn.Module):
    """Norms and gates written out. products: whether the products between them are computed, or their inputs passed on."""

    def __init__(self, products: bool) -> None:
        super().__init__()
        self.products = products
        self.norms = nn.ParameterList(torch.rand(WIDTH) + 0.5 for _ in range(2 * LAYERS + 1))
        sizes = ((WIDTH, WIDTH), (2 * FFN, WIDTH), (WIDTH, FFN))
        self.weights = nn.ParameterList(torch.randn(n, c) * c**-0.5 for n, c in sizes) if products else None

    def product(self, x: Tensor, which: int) -> Tensor:
        if self.weights is not None:
            return linear(x, self.weights[which])
        return x if which == 0 else torch.cat([x] * 6, dim=-1)[:, : 2 * FFN] if which == 1 else x[:, :WIDTH]

    def norm(self, x: Tensor, which: int) -> Tensor:
        return self.norms[which] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    def forward(self, hidden: Tensor) -> Tensor:
        for i in range(LAYERS):
            hidden = hidden + self.product(self.norm(hidden, 2 * i), 0)
            gate, up = self.product(self.norm(hidden, 2 * i + 1), 1).chunk(2, dim=-1)
            hidden = hidden + self.product(silu(gate) * up, 2)
        return self.norm(hidden, 2 * LAYERS)


def by_hand(plain: Plain, ops: Ops, hidden: Tensor) -> Tensor:
    residual = hidden.clone()
    normed = ops.rms_norm(residual, plain.norms[0], EPS)
    for i in range(LAYERS):
        normed = ops.add_rms_norm(plain.product(normed, 0), residual, plain.norms[2 * i + 1], EPS)
        gated = ops.silu_mul(plain.product(normed, 1))
        normed = ops.add_rms_norm(plain.product(gated, 2), residual, plain.norms[2 * i + 2], EPS)
    return normed


def medians(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Microseconds a layer, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) / LAYERS * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    ops = make_ops(2)
    torch.set_num_threads(2)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for products in (False, True):
            plain = Plain(products)
            compiled = torch.compile(plain, backend=fusing(ops), dynamic=False)
            for t in ROWS:
                x = torch.randn(t, WIDTH)
                calls = {"eager": partial(plain, x), "fx": partial(compiled, x), "hand": partial(by_hand, plain, ops, x)}
                expected = calls["eager"]()
                assert all(torch.allclose(call(), expected, atol=1e-3, rtol=1e-3) for call in calls.values())
                rows.append({"products": products, "rows": t, "us_a_layer": medians(calls)})
                print(rows[-1], flush=True)
    found = {
        "machine": processor_name(), "torch": torch.__version__, "command": "python benchmarks/fx_fusion.py",
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(), "rows": rows,
    }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
