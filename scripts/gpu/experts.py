"""A layer of Mixtral's shape: 8 experts of 4096 x 14336, two to a token."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from machine import PEERS, Machine, OutOfTime, row
from shapes import MIXTRAL, MIXTRAL_TOKENS

from apportion.core.number_format import Scheme
from apportion.kernels.ops import ExpertsSpec
from apportion.kernels.reference.number_formats import quantize

FORMATS = (("bfloat16", "bfloat16", 2), ("e4m3_b128x128@e4m3_g128", "fp8_block", 1))  # scheme, the peer's name, bytes of a number


def experts(machine: Machine) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    num_experts, hidden, ffn = MIXTRAL[0], machine.shrunk(MIXTRAL[1], 128), machine.shrunk(MIXTRAL[2], 128)
    try:
        for scheme, name, element_bytes in FORMATS:
            op = machine.ops.experts(ExpertsSpec(num_experts, hidden, ffn, ((scheme,) * 3,)))
            op.bind(torch.empty(op.nbytes, dtype=torch.uint8, device=machine.device))
            for projection, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
                weight = torch.randn(shape) * 0.02
                stored = weight if scheme == "bfloat16" else quantize(weight, Scheme.parse(scheme).weight)
                for expert in range(num_experts):  # all alike: times do not depend on numbers
                    op.load(expert, projection, stored)
            for t in MIXTRAL_TOKENS[: machine.shrunk(99, 2)]:
                rows.append(_row(machine, op, name, t, hidden, ffn, element_bytes))
            del op
    except OutOfTime:
        pass
    return {"rows": rows, "peer": "the fastest distribution of tokens among those published"}


def _row(machine: Machine, op: Any, name: str, t: int, hidden: int, ffn: int, element_bytes: int) -> dict[str, Any]:
    x = machine.random(t, hidden)
    ids = torch.rand(t, MIXTRAL[0], device=machine.device).argsort(1)[:, :2].int()
    weights = torch.rand(t, 2, device=machine.device)
    best, chosen = float("inf"), 0
    tiles = machine.ops.tiles.experts if name == "bfloat16" and not machine.dry else (op.tile,)
    for index, tile in enumerate(tiles):
        op.tile = tile
        best, chosen = min((best, chosen), (machine.microseconds([partial(op, x, ids, weights)]), index))
    used = ids.unique().numel()
    floor = machine.floor_us(used * 3 * hidden * ffn * element_bytes)
    peer = PEERS["experts"][name].get(str(t)) if not machine.dry else None
    return row(f"experts {name} 8x{ffn} T={t}", best, floor, min(peer) if peer else None, used=used, tile=chosen)
