"""Paged and latent attention of every implementation against the reference, over one shared cache."""

import pytest
import torch

from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.kernels.ops import PARTITION_LEN, AttentionSpec
from apportion.kernels.reference.formats import TORCH_DTYPES, read_blocks

LAYER = 5
SHAPES = {  # heads, kv heads, head_dim, window, block_size
    "gqa": (4, 2, 64, None, 32),
    "mha-small": (3, 3, 8, None, 32),
    "7-to-1": (7, 1, 80, None, 32),
    "window": (4, 2, 16, 40, 32),
    "wide-window": (2, 1, 32, 129, 64),
    "wide": (2, 1, 128, None, 128),
}
STEPS = ([60, 33, 1, 0], [39, 1, 3, 1], [1, 1, 1, 200])
SHORT = ([35, 2, 1, 0], [1, 3, 1, 1])  # where a token of a head costs a millisecond


@pytest.fixture
def steps(interpreted):
    return SHORT if interpreted else STEPS


class Batch:
    """Requests that grow step by step, their blocks scattered over the arena."""

    def __init__(self, group, max_len, num_requests, width, order=None):
        per_request = -(-max_len // group.block_size)
        total = num_requests * per_request + 3
        generator = torch.Generator().manual_seed(order or 0)
        blocks = torch.randperm(total, generator=generator)[: num_requests * per_request]
        self.arena = torch.randint(0, 255, (total * group.block_bytes,), dtype=torch.uint8)  # stale bytes, NaN patterns among them
        self.table = (blocks * (group.block_bytes // 256)).int().view(num_requests, per_request)
        self.group = group
        self.inputs = torch.randn(num_requests, max_len, width, generator=torch.Generator().manual_seed(9))
        self.done = [0] * num_requests

    def step(self, counts, requests=None):
        """(input rows, positions, query_start_loc, seq_lens, block_table) of the next tokens of `requests`."""
        requests = list(range(len(self.done))) if requests is None else requests
        ends = [self.done[r] + n for r, n in zip(requests, counts, strict=True)]
        rows = torch.cat([self.inputs[r, self.done[r] : end] for r, end in zip(requests, ends, strict=True)])
        positions = torch.cat([torch.arange(self.done[r], end) for r, end in zip(requests, ends, strict=True)]).int()
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        table = self.table[requests].clone()
        for i, r in enumerate(requests):
            window = self.group.sliding_window
            if window is not None:  # what no query of this step sees is dead
                table[i, : max(0, self.done[r] - window + 1) // self.group.block_size] = -1
            self.done[r] = ends[i]
        return rows, positions, starts, torch.tensor(ends).int(), table


def paged_spec(shape, kv_dtype, **options):
    heads, kv_heads, dim, window, size = SHAPES[shape]
    group = KVGroupSpec((2, LAYER), kv_heads, dim, dim, kv_format(kv_dtype), size, window)
    return AttentionSpec(heads, group, dim**-0.5, options.pop("rotary_dim", dim), **options)


def tolerance(capability, kv_dtype):
    rounded = kv_dtype in capability.rounds_activations
    return {"float32": 2e-5, "float16": 2e-3}.get(kv_dtype, 2e-2) if rounded else 2e-5


# One unit in the last place of a stored number, relative and absolute (of the least numbers).
STEPS_OF = {
    "float32": (1e-5, 1e-5), "bfloat16": (2**-7, 1e-5), "float16": (2**-10, 1e-5), "fp8_e4m3": (2**-3, 2**-9), "fp8_e5m2": (2**-2, 2**-16),
}  # fmt: skip


def scales_of(group):
    """Of keys and values, one for each head, some so small that numbers saturate; of a latent, one for both."""
    k = torch.linspace(0.004, 0.3, group.num_kv_heads)
    return torch.stack((k, k if group.latent else k.flip(0) * 2))


def run_paged(attention, spec, batch, counts, norms=(None, None), requests=None, scales=None):
    """(out, rotated qkv, handle inputs) of one step."""
    qkv, positions, starts, lens, table = batch.step(counts, requests)
    cos_sin = torch.randn(4096, spec.rotary_dim, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    offset = spec.kv.layer_offset(LAYER)
    handle = attention.plan(starts, lens, table, len(counts), len(qkv))
    attention.write(offset, qkv, positions, cos_sin, handle, *norms, scales=scales)
    out = attention.run(offset, qkv, torch.full((len(qkv), spec.num_heads * spec.kv.v_head_dim), torch.nan), handle, scales)
    return out, qkv, (starts, lens, table)


def compare_paged(make_ops, reference, capability, spec, steps, norms=(None, None), scales=None):
    max_len = max(map(sum, zip(*steps, strict=True)))
    width = (spec.num_heads + 2 * spec.kv.num_kv_heads) * spec.kv.head_dim
    mine, oracles = (Batch(spec.kv, max_len, len(steps[0]), width) for _ in range(2))
    attention = make_ops("paged_attention").paged_attention(spec, mine.arena)
    writer, reader = reference.paged_attention(spec, oracles.arena), reference.paged_attention(spec, mine.arena)
    for counts in steps:
        out, qkv, (starts, lens, table) = run_paged(attention, spec, mine, counts, norms, scales=scales)
        _, expected_qkv, _ = run_paged(writer, spec, oracles, counts, norms, scales=scales)
        queries = spec.num_heads * spec.kv.head_dim
        torch.testing.assert_close(qkv[:, :queries], expected_qkv[:, :queries], rtol=1e-5, atol=1e-5)
        handle = reader.plan(starts, lens, table, len(counts), len(qkv))
        expected = reader.run(spec.kv.layer_offset(LAYER), qkv, torch.empty_like(out), handle, scales)
        torch.testing.assert_close(
            out, expected, rtol=tolerance(capability, spec.kv.format.name), atol=tolerance(capability, spec.kv.format.name)
        )
        step, least = STEPS_OF[spec.kv.format.name]
        for n, entries in zip(lens.tolist(), table, strict=True):
            live = entries[: -(-n // spec.kv.block_size)]
            live, skipped = live[live >= 0], int((live < 0).sum()) * spec.kv.block_size
            for got, want in zip(*(read_blocks(b.arena, spec.kv, spec.kv.layer_offset(LAYER), live) for b in (mine, oracles)), strict=True):
                torch.testing.assert_close(got[: n - skipped], want[: n - skipped], rtol=step, atol=least)


@pytest.mark.parametrize("shape", SHAPES)
def test_paged_attention(make_ops, reference, capability, kv_dtype, shape, steps):
    compare_paged(make_ops, reference, capability, paged_spec(shape, kv_dtype), steps)


@pytest.mark.parametrize("shape", ["gqa", "7-to-1", "window"])
def test_paged_attention_scales(make_ops, reference, capability, kv_dtype, shape, steps):
    spec = paged_spec(shape, kv_dtype)
    if not spec.kv.format.scaled:
        pytest.skip(f"{kv_dtype} has no scales")
    compare_paged(make_ops, reference, capability, spec, steps, scales=scales_of(spec.kv))


def test_float8_codes(make_ops, kv_dtype):
    """Every stored number is the nearest one, ties to even; what is too large becomes the largest."""
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.get(kv_dtype)
    if dtype is None:
        pytest.skip(f"{kv_dtype} is no float8")
    group = KVGroupSpec((LAYER,), 1, 64, 64, kv_format(kv_dtype), 32)
    spec = AttentionSpec(1, group, 1.0, 0)
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[grid.isfinite()].sort().values
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat((grid, ties, ties.nextafter(grid[1:]), ties.nextafter(grid[:-1]), torch.tensor([1e9, -1e9, 465.0, 6e4, 1e-30, -0.0])))
    x = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 64)
    batch = Batch(group, len(x), 1, 192)
    batch.inputs = torch.cat((x, x, x), 1)[None]
    attention = make_ops("paged_attention").paged_attention(spec, batch.arena)
    _, _, (_, _, table) = run_paged(attention, spec, batch, [len(x)])
    limit = torch.finfo(dtype).max
    for stored in read_blocks(batch.arena, group, 0, table[0, : -(-len(x) // 32)]):
        assert torch.equal(stored[: len(x), 0], x.clamp(-limit, limit).to(dtype).float())


@pytest.mark.parametrize(
    "options", [{"interleaved": True}, {"rotary_dim": 32}, {"rotary_dim": 32, "interleaved": True}, {"qk_norm_eps": 1e-6}], ids=str
)
def test_paged_attention_rotates_and_normalizes(make_ops, reference, capability, options, steps):
    norms = (torch.rand(64), torch.rand(64)) if "qk_norm_eps" in options else (None, None)
    compare_paged(make_ops, reference, capability, paged_spec("gqa", "float32", **options), steps, norms)


def test_paged_attention_crosses_partitions(make_ops, reference, capability, kv_dtype, interpreted, monkeypatch):
    if interpreted:
        monkeypatch.setattr("apportion.kernels.triton.attention.SPLIT_LEN", 64)
    steps = ([2, 70], [1, 1]) if interpreted else ([PARTITION_LEN - 2, 2 * PARTITION_LEN + 5], [5, 1])
    compare_paged(make_ops, reference, capability, paged_spec("wide" if interpreted else "7-to-1", kv_dtype), steps)


@pytest.mark.parametrize("shape", ["gqa", "7-to-1", "window"])
def test_paged_attention_ignores_batch_chunks_threads_and_placement(make_ops, batch_invariant, kv_dtype, shape):
    """A request's rows, bitwise: among others in chunks, alone at once, with two threads, in other blocks."""
    spec = paged_spec(shape, kv_dtype)
    width = (spec.num_heads + 2 * spec.kv.num_kv_heads) * spec.kv.head_dim
    length = PARTITION_LEN + 70

    def rows_of_request_1(num_threads, order, steps, requests):
        batch = Batch(spec.kv, length, 3, width, order)
        attention = make_ops("paged_attention", num_threads).paged_attention(spec, batch.arena)
        rows = []
        for counts in steps:
            out, _, (starts, _, _) = run_paged(attention, spec, batch, counts, requests=requests)
            at = requests.index(1)
            rows.append(out[starts[at] : starts[at + 1]])
        return torch.cat(rows)

    alone = rows_of_request_1(1, 0, [[length]], [1])
    mixed = [[5, PARTITION_LEN - 10, 33], [1, 20, 0], [300, 58, 1], [1, 1, 40], [0, 1, 1]]
    assert torch.equal(alone, rows_of_request_1(1, 1, mixed, [0, 1, 2]))
    assert torch.equal(alone, rows_of_request_1(2, 2, mixed, [2, 1, 0]))
    assert torch.equal(alone, rows_of_request_1(2, 3, [[length]], [1]))


@pytest.mark.parametrize("heads, latent, rope, values", [(4, 32, 8, 32), (3, 16, 4, 16), (16, 512, 64, 512)], ids=str)
def test_latent_attention(make_ops, reference, capability, kv_dtype, heads, latent, rope, values, steps):
    group = KVGroupSpec((2, LAYER), 1, latent + rope, values, kv_format(kv_dtype), 32, latent=True)
    spec = AttentionSpec(heads, group, 0.11, rope)
    batch = Batch(group, 260, 4, latent + rope)
    attention = make_ops("latent_attention").latent_attention(spec, batch.arena)
    oracle = reference.latent_attention(spec, batch.arena)
    offset = group.layer_offset(LAYER)
    scales = scales_of(group) if group.format.scaled else None
    for counts in steps:
        rows, _, starts, lens, table = batch.step(counts)
        handle, check = (a.plan(starts, lens, table, 4, len(rows)) for a in (attention, oracle))
        attention.write(offset, rows, handle, scales)
        q = torch.randn(len(rows), heads, latent + rope) * 0.3
        out, expected = (
            a.run(offset, q, torch.empty(len(rows), heads, values), h, scales) for a, h in ((attention, handle), (oracle, check))
        )
        torch.testing.assert_close(out, expected, rtol=tolerance(capability, kv_dtype), atol=tolerance(capability, kv_dtype))
        for r, n in enumerate(lens.tolist()):
            stored, _ = read_blocks(batch.arena, group, offset, table[r, : -(-n // 32)])
            x, dtype = batch.inputs[r, :n], TORCH_DTYPES[kv_dtype]
            if scales is not None:
                x = (x / scales[0]).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
            assert torch.equal(stored[:n, 0], x.to(dtype).float())


def test_latent_attention_ignores_batch_chunks_and_threads(make_ops, batch_invariant, kv_dtype):
    group = KVGroupSpec((2, LAYER), 1, 40, 32, kv_format(kv_dtype), 32, latent=True)
    spec, offset, length = AttentionSpec(5, group, 0.2, 8), group.layer_offset(LAYER), PARTITION_LEN + 70
    queries = torch.randn(3, length, 5, 40)

    def rows_of_request_1(num_threads, order, steps, requests):
        batch = Batch(group, length, 3, 40, order)
        attention = make_ops("latent_attention", num_threads).latent_attention(spec, batch.arena)
        rows, at = [], requests.index(1)
        for counts in steps:
            before = list(batch.done)
            latent, _, starts, lens, table = batch.step(counts, requests)
            handle = attention.plan(starts, lens, table, len(requests), len(latent))
            attention.write(offset, latent, handle)
            q = torch.cat([queries[r, before[r] : batch.done[r]] for r in requests])
            out = attention.run(offset, q, torch.empty(len(latent), 5, 32), handle)
            rows.append(out[starts[at] : starts[at + 1]])
        return torch.cat(rows)

    alone = rows_of_request_1(1, 0, [[length]], [1])
    mixed = [[5, PARTITION_LEN - 10, 33], [1, 20, 0], [300, 59, 1], [1, 1, 40]]
    assert torch.equal(alone, rows_of_request_1(1, 1, mixed, [0, 1, 2]))
    assert torch.equal(alone, rows_of_request_1(2, 2, mixed, [2, 1, 0]))
