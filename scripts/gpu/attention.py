"""Decode attention of 32 query heads over 8 kv heads of 128 channels: online and unified maximum, bf16 and fp8 KV, every tile."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from machine import PEERS, Machine, OutOfTime, geomean, row
from shapes import ATTENTION

from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.kernels.ops import AttentionSpec

PHI = 8.0  # of every head: random queries and keys leave no row out of range


def attention(machine: Machine) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    try:
        for dtype, element_bytes in (("bfloat16", 2), ("fp8", 1)):
            for requests, context in ATTENTION[: machine.shrunk(99, 1)]:
                rows += _point(machine, dtype, element_bytes, requests, machine.shrunk(context, 64))
    except OutOfTime:
        pass
    summary = {}
    for dtype in ("bfloat16", "fp8"):
        best: dict[str, tuple[float, float, int]] = {}
        for r in (r for r in rows if r["dtype"] == dtype and r["peer_us"]):
            ratio = r["peer_us"] / r["us"]
            best[r["point"]] = max(best.get(r["point"], (0.0, 0.0, 0)), (ratio, r["us"], r["tokens"]))
        summary[f"{dtype}_geomean_to_16k_tokens"] = geomean([ratio for ratio, _, tokens in best.values() if tokens <= 16384])
        summary[f"{dtype}_geomean_beyond"] = geomean([ratio for ratio, _, tokens in best.values() if tokens > 16384])
    pairs = [(rows[i]["us"], rows[i + 1]["us"]) for i in range(0, len(rows) - 1, 2)]
    return {"rows": rows, **summary, "unified_slowest": min((online / unified for online, unified in pairs), default=None)}


def _point(machine: Machine, dtype: str, element_bytes: int, requests: int, context: int) -> list[dict[str, Any]]:
    """(online, unified) rows. The KV of several sets is read in turn, so that it comes from memory."""
    group = KVGroupSpec((0,), 8, 128, 128, kv_format(dtype), 32)
    nbytes = requests * context * 2 * 8 * 128 * element_bytes
    blocks, sets = context // 32, machine.copies(nbytes)
    arena = machine.random(sets * requests * blocks * group.block_bytes // 2).view(torch.uint8)
    if element_bytes == 1:
        arena &= 0xBF  # every byte an e4m3 number below 2
    order = torch.randperm(sets * requests * blocks).view(sets, requests, blocks).int() * (group.block_bytes // 256)
    attentions = [machine.ops.paged_attention(AttentionSpec(32, group, 128**-0.5, 128), arena) for _ in range(sets)]
    lens, starts = torch.full((requests,), context).int(), torch.arange(requests + 1).int()
    handles = [op.plan(starts, lens, table, requests, requests) for op, table in zip(attentions, order, strict=True)]
    qkv, out = machine.random(requests, 6144), machine.random(requests, 4096)
    point, rows = f"{requests}x{context}", []
    for kind, phi in (("online", None), ("unified", torch.full((32,), PHI))):
        best, chosen = float("inf"), 0
        for index, tile in enumerate(machine.ops.tiles.decode[: machine.shrunk(99, 1)]):
            for op in attentions:
                op.unify(0, phi)
                op.decode_tile = tile
            us = machine.microseconds([partial(op.run, 0, qkv, out, handle) for op, handle in zip(attentions, handles, strict=True)])
            best, chosen = min((best, chosen), (us, index))
        peer = PEERS["decode_attention"][dtype].get(point)
        what = f"decode {dtype} R={requests} context={context} {kind}"
        more = {"dtype": dtype, "point": point, "tokens": requests * context, "tile": chosen}
        rows.append(row(what, best, machine.floor_us(nbytes), peer, **more))
    rows[1]["recomputed"] = sum(int(op.recomputed) for op in attentions)
    return rows
