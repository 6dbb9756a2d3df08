"""The unified maximum of the CPU's attention: exact in range, computed again out of it, and a row's bits are its own either way."""

import math

import pytest
import torch

from apportion.core.errors import InternalError
from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.kernels.dispatch import implementations
from apportion.kernels.ops import PARTITION_LEN, AttentionSpec
from apportion.platforms.platform import ComputeShare, select_platform
from tests.conformance.test_attention import LAYER, Batch, paged_spec, run_paged

AVAILABLE = [i for i in implementations() if i.backend == "cpu" and not i.unavailable]
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels are not built")
LENGTH = PARTITION_LEN + 70
NAN = math.nan


@pytest.fixture(params=AVAILABLE, ids=lambda i: i.name)
def make(request):
    def make(num_threads=1):
        cores = select_platform("cpu").cores
        return request.param.make(ComputeShare(tuple(cores[i % len(cores)] for i in range(num_threads))))

    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)


def rows_of(make, phi, num_threads, steps, requests, kv_dtype="bfloat16", gain=1.0):
    """(rows of request 1, rows that were computed again in all)"""
    spec = paged_spec("gqa", kv_dtype)
    width = (spec.num_heads + 2 * spec.kv.num_kv_heads) * spec.kv.head_dim
    batch = Batch(spec.kv, LENGTH, 3, width)
    batch.inputs[..., : spec.num_heads * spec.kv.head_dim] *= gain
    attention = make(num_threads).paged_attention(spec, batch.arena)
    attention.unify(spec.kv.layer_offset(LAYER), None if phi is None else torch.tensor(phi))
    rows = []
    for counts in steps:
        out, _, (starts, _, _) = run_paged(attention, spec, batch, counts, requests=requests)
        at = requests.index(1)
        rows.append(out[starts[at] : starts[at + 1]])
    return torch.cat(rows), attention.recomputed


ALONE = ([[LENGTH]], [1])
MIXED = ([[5, PARTITION_LEN - 10, 33], [1, 20, 0], [300, 58, 1], [1, 1, 40], [0, 1, 1]], [0, 1, 2])


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "fp8_e4m3"])
def test_in_range_it_is_the_online_softmax(make, kv_dtype):
    online, none = rows_of(make, None, 1, *ALONE, kv_dtype)
    unified, recomputed = rows_of(make, [0.0, 3.0, -5.0, 20.0], 1, *ALONE, kv_dtype)
    assert none == recomputed == 0
    torch.testing.assert_close(
        unified, online, rtol=1e-2 if kv_dtype == "bfloat16" else 1e-5, atol=5e-3 if kv_dtype == "bfloat16" else 1e-5
    )


@pytest.mark.parametrize("phi", [[400.0] * 4, [-400.0] * 4], ids=["underflow", "overflow"])
def test_out_of_range_its_bits_are_those_of_the_online_softmax(make, phi):
    online, _ = rows_of(make, None, 1, *ALONE)
    unified, recomputed = rows_of(make, phi, 2, *ALONE)
    assert recomputed == 4 * LENGTH and torch.equal(unified, online)


def test_heads_without_a_maximum_stay_online(make):
    online, _ = rows_of(make, None, 1, *ALONE)
    unified, recomputed = rows_of(make, [NAN, 0.0, NAN, 400.0], 1, *ALONE)
    wide = unified.unflatten(1, (4, -1))
    assert torch.equal(wide[:, [0, 2, 3]], online.unflatten(1, (4, -1))[:, [0, 2, 3]]) and recomputed == LENGTH
    assert not torch.equal(wide[:, 1], online.unflatten(1, (4, -1))[:, 1]), "another order of roundings"


@pytest.mark.parametrize("gain, phi", [(1.0, 0.0), (60.0, 0.0), (1.0, 63.0)], ids=["inside", "high", "low"])
def test_a_row_ignores_batch_chunks_and_threads(make, gain, phi):
    """Where some rows leave the range and others do not, each by itself."""
    alone, recomputed = rows_of(make, [phi] * 4, 1, *ALONE, gain=gain)
    assert (recomputed > 0) == (gain > 1 or phi > 0) and recomputed < 4 * LENGTH
    for num_threads in (1, 2):
        assert torch.equal(rows_of(make, [phi] * 4, num_threads, *MIXED, gain=gain)[0], alone)


def test_latent_attention_has_it_too(make):
    group = KVGroupSpec((2, LAYER), 1, 40, 32, kv_format("float32"), 32, latent=True)
    spec, offset = AttentionSpec(5, group, 0.2, 8), group.layer_offset(LAYER)
    batch, outs = Batch(group, 200, 1, 40), []
    attention = make().latent_attention(spec, batch.arena)
    latent, _, starts, lens, table = batch.step([200])
    handle = attention.plan(starts, lens, table, 1, 200)
    attention.write(offset, latent, handle)
    q = torch.randn(200, 5, 40)
    for phi in (None, torch.zeros(5), torch.full((5,), 300.0)):
        attention.unify(offset, phi)
        outs.append(attention.run(offset, q, torch.empty(200, 5, 32), handle).clone())
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(outs[2], outs[0]) and attention.recomputed == 5 * 200


def test_maxima_of_another_number_of_heads_are_refused(make):
    spec = paged_spec("gqa", "float32")
    with pytest.raises(InternalError, match="given for 4 heads"):
        make().paged_attention(spec, Batch(spec.kv, 64, 1, 64).arena).unify(0, torch.zeros(3))
