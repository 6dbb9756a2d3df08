"""The oracle against formulations that share nothing with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.kernels.ops import AttentionSpec, ExpertsSpec, RouteSpec, SamplingRows
from apportion.kernels.reference.formats import read_blocks, split_block, write_tokens
from apportion.kernels.reference.ops import ReferenceOps
from apportion.kernels.reference.sampling import philox4x32, uniform

OPS = ReferenceOps()


@pytest.mark.parametrize(
    "counter, key, words",
    [  # known answers published with Random123 (kat_vectors, philox4x32 10)
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    got = philox4x32(np.array([counter], np.uint64), np.array([key], np.uint64))[0]
    assert " ".join(f"{word:08x}" for word in got) == words


def test_uniform_is_spread_and_takes_negative_seeds():
    u = uniform(torch.full((100_000,), -7), torch.arange(100_000))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005
    assert uniform(torch.tensor([0]), torch.tensor([0])).item() == (0x6627E8D5 >> 8) * 2.0**-24
    assert len(set(uniform(torch.arange(-50, 50), torch.zeros(100, dtype=torch.long)).tolist())) == 100


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("latent", [False, True])
def test_block_layout_is_the_one_of_kv_spec(name, latent):
    """Every element by the formula in the docstring of core/kv_spec, written out."""
    group = KVGroupSpec((0, 1), 1 if latent else 3, 6, 4, kv_format(name), 32, latent=latent)
    lanes, size = group.format.lanes, group.block_size
    k, v = split_block(torch.arange(group.layer_bytes // group.format.element_bytes)[None], group)
    for head, channel, token in [(0, 0, 0), (2, 5, 31), (1, 3, 17), (0, 2, 1)]:
        head *= not latent
        width, start = (group.head_dim, 0) if latent else (group.v_head_dim, group.k_bytes // group.format.element_bytes)
        in_v = ((head * (size // lanes) + token // lanes) * width + channel) * lanes + token % lanes + start
        in_k = in_v if latent else ((head * (6 // lanes) + channel // lanes) * size + token) * lanes + channel % lanes
        assert k[0, token, head, channel] == in_k
        if channel < 4:
            assert v[0, token, head, channel] == in_v


def test_what_is_written_is_read_and_nothing_else_changes():
    group = KVGroupSpec((4, 7), 2, 7, 7, kv_format("bfloat16"), 32)  # an odd head_dim leaves a padded lane
    arena = torch.randint(0, 255, (6 * group.block_bytes,), dtype=torch.uint8)
    before = arena.clone()
    k, v = torch.randn(3, 2, 7).bfloat16().float(), torch.randn(3, 2, 7).bfloat16().float()
    entries, slots = torch.tensor([5, 2, 5]) * (group.block_bytes // 256), torch.tensor([31, 0, 4])
    write_tokens(arena, group, group.layer_offset(7), entries, slots, k, v)
    got_k, got_v = read_blocks(arena, group, group.layer_offset(7), entries)
    rows = torch.arange(3) * 32 + slots
    assert torch.equal(got_k[rows], k) and torch.equal(got_v[rows], v)
    assert (arena != before).sum() <= 3 * 2 * 7 * 2 * 2


@pytest.mark.parametrize("heads, kv_heads, dim, window", [(4, 2, 8, None), (7, 1, 80, None), (4, 4, 16, 40)])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_paged_attention_equals_dense_attention(heads, kv_heads, dim, window, name):
    torch.manual_seed(0)
    group = KVGroupSpec((3, 5), kv_heads, dim, dim, kv_format(name), 32, window)
    arena = torch.randint(0, 255, (20 * group.block_bytes,), dtype=torch.uint8)  # stale bytes, NaN patterns among them
    attention = OPS.paged_attention(AttentionSpec(heads, group, dim**-0.5, dim), arena)
    table = (torch.randperm(20)[:15] * (group.block_bytes // 256)).int().view(3, 5)
    lengths = [100, 33, 5]
    prompts = [torch.randn(n, (heads + 2 * kv_heads) * dim) for n in lengths]
    cos_sin, offset = torch.randn(128, dim), group.layer_offset(5)
    got, done = [[], [], []], [0, 0, 0]
    for counts in ([60, 33, 1], [39, 0, 3], [1, 0, 1]):
        ends = [d + n for d, n in zip(done, counts, strict=True)]
        qkv = torch.cat([p[d:e] for p, d, e in zip(prompts, done, ends, strict=True)])
        positions = torch.cat([torch.arange(d, e) for d, e in zip(done, ends, strict=True)]).int()
        starts = torch.tensor([0, *np.cumsum(counts)]).int()
        plan = attention.plan(starts, torch.tensor(ends).int(), table, 3, len(positions))
        attention.write(offset, qkv, positions, cos_sin, plan)
        out = attention.run(offset, qkv, torch.empty(len(positions), heads * dim), plan)
        for request, rows in enumerate(out.split(counts)):
            got[request].append(rows)
        done = ends
    for n, prompt, rows in zip(lengths, prompts, got, strict=True):
        q, k, v = (x.unflatten(-1, (-1, dim)).clone() for x in prompt.split([heads * dim, kv_heads * dim, kv_heads * dim], -1))
        for x in (q, k):
            OPS.rotate(x, torch.arange(n), cos_sin, False)
        stored = (x.to(getattr(torch, name)).float().transpose(0, 1) for x in (k, v))
        distance = torch.arange(n)[:, None] - torch.arange(n)
        mask = (distance >= 0) & (distance < (window or n))
        expected = F.scaled_dot_product_attention(q.transpose(0, 1), *stored, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(torch.cat(rows), expected.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)


def test_experts_equal_a_loop_over_tokens():
    torch.manual_seed(0)
    experts = OPS.experts(ExpertsSpec(4, 12, 10))
    experts.bind(torch.zeros(experts.nbytes, dtype=torch.uint8))
    gate, up, down = torch.randn(4, 10, 12), torch.randn(4, 10, 12), torch.randn(4, 12, 10)
    for e in range(4):
        experts.load(e, "gate", gate[e])
        experts.load(e, "up", up[e, :6])
        experts.load(e, "up", up[e, 6:], row=6)
        experts.load(e, "down", down[e])
    x, ids, weights = torch.randn(5, 12), torch.tensor([[0, 3], [1, 1], [2, -1], [-1, -1], [3, 0]]).int(), torch.rand(5, 2)
    expected = torch.stack(
        [
            sum((w * down[e] @ (F.silu(gate[e] @ t) * (up[e] @ t)) for e, w in zip(i, p, strict=True) if e >= 0), torch.zeros(12))
            for t, i, p in zip(x, ids, weights, strict=True)
        ]
    )
    torch.testing.assert_close(experts(x, ids, weights), expected)


def test_routing_breaks_ties_to_the_lower_id_and_stays_in_the_best_groups():
    ids, weights = OPS.route(torch.zeros(1, 6), RouteSpec(6, 3))
    assert ids.tolist() == [[0, 1, 2]] and torch.allclose(weights, torch.full((1, 3), 1 / 3))
    logits = torch.tensor([[5.0, 0.0, 4.9, 4.8, 1.0, 1.1]])  # groups (5, 0), (4.9, 4.8), (1, 1.1)
    ids, weights = OPS.route(logits, RouteSpec(6, 3, renormalize=False, num_groups=3, top_groups=2, scale=2.0))
    assert ids.tolist() == [[0, 2, 3]]
    assert torch.allclose(weights, 2 * logits.softmax(-1)[:, [0, 2, 3]])
    ids, _ = OPS.route(logits, RouteSpec(6, 3, num_groups=3, top_groups=1, scoring="sigmoid"))
    assert ids[0, :2].tolist() == [0, 1]


def rows(n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    fill = lambda value: torch.full((n,), value)  # noqa: E731
    return SamplingRows(fill(temperature), fill(top_k).int(), fill(top_p), fill(min_p), fill(11), torch.arange(n))


@pytest.mark.parametrize(
    "limits, support",
    [
        ({}, [0.1, 0.3, 0.4, 0.2]),
        ({"top_k": 2}, [0, 0.3, 0.4, 0]),
        ({"top_p": 0.85}, [0, 0.3, 0.4, 0.2]),
        ({"top_p": 0.6}, [0, 0.3, 0.4, 0]),
        ({"min_p": 0.6}, [0, 0.3, 0.4, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 0.3, 0.4, 0]),
        ({"temperature": 0.5}, [0.01, 0.09, 0.16, 0.04]),
    ],
)
def test_sampling_follows_the_distribution(limits, support):
    logits = torch.tensor([0.1, 0.3, 0.4, 0.2]).log().repeat(4000, 1)
    counts = OPS.sample(logits, rows(4000, **limits)).bincount(minlength=4) / 4000
    expected = torch.tensor(support) / sum(support)
    assert (counts - expected).abs().max() < 0.03
    assert (counts[expected == 0] == 0).all()


def test_greedy_ties_and_nan_rows():
    logits = torch.tensor([[1.0, 3.0, 3.0], [torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [-torch.inf, 0.0, -1.0]])
    assert OPS.sample(logits, rows(4, temperature=0.0)).tolist() == [1, -1, -1, 1]
    assert OPS.sample(logits, rows(4)).tolist()[1:3] == [-1, -1]


def test_logprobs_and_ranks():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    chosen, rank, top, values = OPS.logprobs(logits, torch.tensor([3]), 2)
    assert rank.tolist() == [3] and top.tolist() == [[1, 2]]
    assert torch.allclose(chosen, logits.log_softmax(-1)[0, 3]) and torch.allclose(values, logits.log_softmax(-1)[:, 1:3])
