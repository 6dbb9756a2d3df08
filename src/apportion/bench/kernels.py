"""Single operators at the shapes of the benchmarks: attention over long contexts, sampling over large vocabularies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from apportion.core.kv_spec import UNIT_BYTES, KVGroupSpec, kv_format
from apportion.kernels.dispatch import select_ops
from apportion.kernels.ops import AttentionSpec, Ops, SamplingRows
from apportion.platforms.platform import select_platform


def make_ops(num_threads: int | None = None) -> Ops:
    """The operators that an engine would choose here, the calling thread pinned as its worker would be."""
    platform = select_platform("cpu")
    (share,) = platform.compute_shares([num_threads or platform.num_cores])
    platform.enter(share)
    torch.set_num_threads(1)
    return select_ops(platform, share)


def attention_decode_rate(ops: Ops, *, context_len: int = 8192, num_requests: int = 4, num_layers: int = 16, passes: int = 5) -> float:
    """Bytes of KV read per second by one decode step's attention (16 heads over 4 KV heads of 64, bf16).

    All layers in turn, as a step does, so that no layer's KV is still in a cache when its turn comes again.
    """
    kv = KVGroupSpec(tuple(range(num_layers)), 4, 64, 64, kv_format("bfloat16"), 32)
    spec = AttentionSpec(num_heads=16, kv=kv, scale=0.125, rotary_dim=64)
    blocks_each = -(-context_len // kv.block_size)
    arena = select_platform("cpu").create_arena(num_requests * blocks_each * kv.block_bytes)
    arena.tensor.view(torch.bfloat16).fill_(0.01)
    attention = ops.paged_attention(spec, arena.tensor)
    units = kv.block_bytes // UNIT_BYTES
    table = torch.randperm(num_requests * blocks_each, generator=torch.Generator().manual_seed(0)).to(torch.int32) * units
    table = table.view(num_requests, blocks_each).contiguous()
    starts = torch.arange(num_requests + 1, dtype=torch.int32)
    lengths = torch.full((num_requests,), context_len, dtype=torch.int32)
    qkv, out = torch.randn(num_requests, (16 + 2 * 4) * 64), torch.empty(num_requests, 16 * 64)

    def step() -> None:
        handle = attention.plan(starts, lengths, table, num_requests, num_requests)
        for layer in kv.layers:
            attention.run(kv.layer_offset(layer), qkv, out, handle)

    num_bytes = num_requests * context_len * num_layers * 2 * 4 * 64 * 2
    rate = num_bytes / best_s(step, passes)
    arena.close()
    return rate


def sampling_row_s(ops: Ops, *, vocab: int = 131072, num_rows: int = 16, passes: int = 5) -> dict[str, float]:
    """Seconds per row of logits: greedy, drawn at temperature 1, with top_k and top_p, and with top_p over the whole vocabulary."""
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(0)) * 3
    found = {}
    ways = (("greedy", 0.0, 0, 1.0), ("temperature 1", 1.0, 0, 1.0), ("top_k 50, top_p 0.9", 1.0, 50, 0.9), ("top_p 0.9", 1.0, 0, 0.9))
    for name, temperature, top_k, top_p in ways:
        rows = SamplingRows(
            temperature=torch.full((num_rows,), temperature),
            top_k=torch.full((num_rows,), top_k, dtype=torch.int32),
            top_p=torch.full((num_rows,), top_p),
            min_p=torch.zeros(num_rows),
            seed=torch.arange(num_rows, dtype=torch.int64),
            position=torch.arange(num_rows, dtype=torch.int64),
        )
        found[name] = best_s(lambda rows=rows: ops.sample(logits, rows), passes) / num_rows
    return found


def best_s(call: Callable[[], object], passes: int) -> float:
    """The fastest of `passes` calls after one that warms up."""
    call()
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
