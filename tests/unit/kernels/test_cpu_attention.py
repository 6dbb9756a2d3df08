"""The CPU attention kernels against the reference, and against themselves: one request's rows must not change by a bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from apportion.core.errors import Unsupported
from apportion.core.kv_spec import UNIT_BYTES, KVGroupSpec, kv_format
from apportion.kernels.cpu import ROUNDS_ACTIVATIONS, extension
from apportion.kernels.ops import AttentionSpec
from apportion.kernels.reference.attention import ReferenceLatentAttention, ReferencePagedAttention

if not extension.available():
    pytest.skip(f"no compiled kernels: {extension.ABSENT}", allow_module_level=True)

from apportion.kernels.cpu.attention import LatentAttention, PagedAttention, Rotary

MODULE = extension.load()
ISAS = [name for name, state in MODULE.features()["sets"].items() if state["available"]]
MAX_POSITIONS = 4096


@pytest.fixture(params=ISAS)
def isa(request):
    before = MODULE.features()["isa"]
    MODULE.select_isa(request.param)
    yield request.param
    MODULE.select_isa(before)


def make_spec(
    heads=8, kv_heads=2, dim=64, *, v_dim=None, dtype="float32", window=None, block_size=32, eps=None, interleaved=False, latent=False
):
    kv = KVGroupSpec(tuple(range(2)), kv_heads, dim, v_dim or dim, kv_format(dtype), block_size, window, latent)
    return AttentionSpec(heads, kv, dim**-0.5, 0 if latent else dim // 4 * 2 or 2, interleaved, eps)


@dataclass
class Request:
    """qkv [S, C] of all its tokens; scheduled: how many tokens each step takes."""

    qkv: Tensor
    steps: list[int]


def make_requests(spec: AttentionSpec, *steps: list[int], seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    kv = spec.kv
    width = kv.head_dim if kv.latent else spec.num_heads * kv.head_dim + kv.num_kv_heads * (kv.head_dim + kv.v_head_dim)
    return [Request(torch.randn(sum(s), width, generator=generator), s) for s in steps]


class Runner:
    """Runs requests step by step over one arena, blocks handed out in a shuffled order; collects each request's rows."""

    def __init__(self, spec: AttentionSpec, kind=PagedAttention, threads: int = 2, seed: int = 0, num_blocks: int = 256) -> None:
        self.spec = spec
        units = spec.kv.block_bytes // UNIT_BYTES
        # NaN everywhere: whatever is read without having been written shows
        self.arena = torch.full((num_blocks * spec.kv.block_bytes // 4 + 16,), float("nan")).view(torch.uint8)
        if kind in (ReferencePagedAttention, ReferenceLatentAttention):
            self.kernel = kind(spec, self.arena)
        else:
            self.kernel = kind(MODULE.ThreadTeam(threads), spec, self.arena)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        self.free = [block * units for block in order]
        self.cos_sin = torch.randn(MAX_POSITIONS, max(spec.rotary_dim, 2), generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
        width = spec.kv.head_dim
        self.norms = (torch.linspace(0.5, 2, width), torch.linspace(2, 0.5, width)) if spec.qk_norm_eps else (None, None)

    def __call__(self, requests: list[Request], layer: int = 1) -> list[Tensor]:
        tables: list[list[int]] = [[] for _ in requests]
        done, outs = [0] * len(requests), [[] for _ in requests]
        for step in range(max(len(r.steps) for r in requests)):
            batch = [i for i, r in enumerate(requests) if step < len(r.steps)]
            counts = [requests[i].steps[step] for i in batch]
            for i, count in zip(batch, counts, strict=True):
                while len(tables[i]) * self.spec.kv.block_size < done[i] + count:
                    tables[i].append(self.free.pop())
                if self.spec.kv.sliding_window:  # blocks no query will see again are dead
                    for b in range(max(0, done[i] - self.spec.kv.sliding_window + 1) // self.spec.kv.block_size):
                        tables[i][b] = -1
            rows = torch.cat([requests[i].qkv[done[i] : done[i] + n] for i, n in zip(batch, counts, strict=True)])
            out = self.step(
                rows,
                [tables[i] for i in batch],
                counts,
                [done[i] + n for i, n in zip(batch, counts, strict=True)],
                layer,
            )
            for i, n, piece in zip(batch, counts, out.split(counts), strict=True):
                outs[i].append(piece)
                done[i] += n
        return [torch.cat(o) for o in outs]

    def step(self, rows: Tensor, tables: list[list[int]], counts: list[int], lens: list[int], layer: int) -> Tensor:
        table = torch.full((len(tables), max(map(len, tables)) + 1), -1, dtype=torch.int32)
        for r, entries in enumerate(tables):
            table[r, : len(entries)] = torch.tensor(entries)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        seq_lens = torch.tensor(lens, dtype=torch.int32)
        positions = torch.cat([torch.arange(end - n, end) for n, end in zip(counts, lens, strict=True)]).int()
        handle = self.kernel.plan(starts, seq_lens, table, len(counts), len(rows))
        spec, offset = self.spec, self.spec.kv.layer_offset(layer)
        if spec.kv.latent:
            self.kernel.write(offset, rows, handle)
            q = torch.stack([rows * (h + 1) / spec.num_heads for h in range(spec.num_heads)], dim=1).flip(2).contiguous()
            return self.kernel.run(offset, q, torch.empty(len(rows), spec.num_heads, spec.kv.v_head_dim), handle).flatten(1)
        rows = rows.clone()
        self.kernel.write(offset, rows, positions, self.cos_sin[:, : spec.rotary_dim].contiguous(), handle, *self.norms)
        return self.kernel.run(offset, rows, torch.empty(len(rows), spec.num_heads * spec.kv.v_head_dim), handle)


def reference(spec: AttentionSpec, requests: list[Request]) -> list[Tensor]:
    return Runner(spec, ReferenceLatentAttention if spec.kv.latent else ReferencePagedAttention)(requests)


def rounds_inputs(isa: str, spec: AttentionSpec) -> bool:
    return spec.kv.format.name == "bfloat16" and spec.kv.format.name in ROUNDS_ACTIVATIONS.get(isa, ())


def tolerance(isa: str, spec: AttentionSpec) -> dict[str, float]:
    return {"rtol": 2e-2, "atol": 2e-2} if rounds_inputs(isa, spec) else {"rtol": 2e-5, "atol": 2e-5}


SHAPES = {
    "gqa": make_spec(),
    "mha_8": make_spec(4, 4, 8),
    "seven_to_one": make_spec(14, 2, 64, dtype="bfloat16"),
    "dim_80_fp16": make_spec(4, 2, 80, dtype="float16", eps=1e-6),
    "dim_16_bf16_blocks_of_64": make_spec(6, 1, 16, dtype="bfloat16", block_size=64, interleaved=True),
    "dim_128": make_spec(8, 2, 128, dtype="bfloat16", eps=1e-5),
    "dim_256_v_96": make_spec(2, 1, 256, v_dim=96, dtype="bfloat16"),
    "dim_36": make_spec(3, 3, 36, v_dim=20, dtype="float16"),
    "window_50": make_spec(4, 2, 32, dtype="bfloat16", window=50),
    "window_1": make_spec(4, 2, 32, window=1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_matches_the_reference(isa, name):
    spec = SHAPES[name]
    requests = make_requests(spec, [70, 1, 1, 30], [1, 1, 1, 1], [33, 17], [130])
    for got, want in zip(Runner(spec)(requests), reference(spec, requests), strict=True):
        torch.testing.assert_close(got, want, **tolerance(isa, spec))


@pytest.mark.parametrize("window", [None, 1500])
def test_merges_partitions(isa, window):
    spec = make_spec(4, 2, 16, dtype="float16", window=window)
    requests = make_requests(spec, [2100, 1, 1], [1023, 1, 1, 1])
    for got, want in zip(Runner(spec)(requests), reference(spec, requests), strict=True):
        torch.testing.assert_close(got, want, **tolerance(isa, spec))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bits_do_not_depend_on_how_a_request_is_run(isa, dtype):
    """Alone or in a batch, in any chunks, decoded or recomputed as prefill, on 1 or 2 threads: the same bits."""
    spec = make_spec(7, 1, 32, dtype=dtype, window=1100)
    (whole,) = make_requests(spec, [1200], seed=3)
    (want,) = Runner(spec, threads=1)([whole])
    others = make_requests(spec, [5, 900, 1], [64, 1, 1, 1, 1, 1], seed=4)
    for threads in (1, 2):
        for steps in ([1200], [1000, 199, 1], [33, 500, 600, *[1] * 67], [1190, *[1] * 10]):
            request = Request(whole.qkv, steps)
            (alone,) = Runner(spec, threads=threads, seed=5)([request])
            assert torch.equal(alone, want)
            assert torch.equal(Runner(spec, threads=threads, seed=6)([others[0], request, others[1]])[1], want)


def test_many_partitions_are_shared_out_without_changing_a_bit(isa):
    spec = make_spec(2, 1, 16, dtype="bfloat16")
    (request,) = make_requests(spec, [3500, 1])
    one, two = Runner(spec, threads=1), Runner(spec, threads=2)
    assert torch.equal(one([request])[0], two([request])[0])
    table = torch.arange(110, dtype=torch.int32)[None]
    plan = two.kernel.plan(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3501], dtype=torch.int32), table, 1, 1)
    assert plan.num_items == 4 and plan.num_merges == 1


def test_a_nan_stays_in_its_request(isa):
    spec = make_spec(4, 2, 32, dtype="bfloat16")
    requests = make_requests(spec, [40, 1], [50, 1])
    want = Runner(spec)(requests)[1]
    requests[0].qkv[7] = float("nan")
    sick, well = Runner(spec)(requests)
    assert sick[40].isnan().all()
    assert torch.equal(well, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stores_what_the_reference_stores(isa, dtype):
    spec = make_spec(4, 2, 32, v_dim=20, dtype=dtype, eps=1e-6)
    requests = make_requests(spec, [37, 1, 9])
    ours, theirs = Runner(spec), Runner(spec, ReferencePagedAttention)
    ours(requests), theirs(requests)
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    got, want = ours.arena.view(stored).float(), theirs.arena.view(stored).float()
    written = ~want.isnan()
    torch.testing.assert_close(got[written], want[written], rtol=1e-2 if dtype != "float32" else 1e-5, atol=1e-5)
    assert (got[~written].isnan() | (got[~written] == 0)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("heads", "dim", "v_dim"), [(16, 576, 512), (5, 40, 24)])
def test_latent_attention(isa, dtype, heads, dim, v_dim):
    spec = make_spec(heads, 1, dim, v_dim=v_dim, dtype=dtype, latent=True)
    requests = make_requests(spec, [40, 1, 1], [1, 1, 70])
    for got, want in zip(Runner(spec, LatentAttention)(requests), reference(spec, requests), strict=True):
        torch.testing.assert_close(got, want, **tolerance(isa, spec))
    whole = [replace(r, steps=[sum(r.steps)]) for r in requests]
    for got, want in zip(Runner(spec, LatentAttention, threads=1)(whole), Runner(spec, LatentAttention)(requests), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate(isa, interleaved):
    from apportion.kernels.reference.elementwise import rotate as expected

    x = torch.randn(40, 3, 50)[:, :, 5:41]
    cos_sin, positions = torch.randn(64, 36), torch.randint(0, 64, (40,), dtype=torch.int32)
    want = x.clone()
    expected(want, positions, cos_sin, interleaved)
    Rotary(MODULE.ThreadTeam(2)).rotate(x, positions, cos_sin, interleaved)
    torch.testing.assert_close(x, want)


def test_refuses_what_it_cannot_do():
    arena, team = torch.zeros(1 << 16, dtype=torch.uint8), MODULE.ThreadTeam(1)
    with pytest.raises(Unsupported, match="block sizes that are multiples of 32"):
        PagedAttention(team, make_spec(block_size=16), arena)
    with pytest.raises(Unsupported, match="multiple of 2, got 33"):
        PagedAttention(team, make_spec(dim=33, dtype="bfloat16"), arena)
    with pytest.raises(Unsupported, match="5 query heads"):
        PagedAttention(team, make_spec(5, 2), arena)
