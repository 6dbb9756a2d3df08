"""Sampling on the CPU against a plain sort in float64, and its distribution against the probabilities."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from apportion.kernels.cpu import extension
from apportion.kernels.ops import SamplingRows
from apportion.kernels.reference import sampling as reference

if not extension.available():
    pytest.skip(f"no compiled kernels: {extension.ABSENT}", allow_module_level=True)

from apportion.kernels.cpu.sampling import Sampling

MODULE = extension.load()
ISAS = [name for name, state in MODULE.features()["sets"].items() if state["available"]]


@pytest.fixture(params=ISAS)
def kernel(request):
    before = MODULE.features()["isa"]
    MODULE.select_isa(request.param)
    yield Sampling(MODULE.ThreadTeam(2))
    MODULE.select_isa(before)


def make_rows(count: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, first_seed=0) -> SamplingRows:
    return SamplingRows(
        torch.full((count,), float(temperature)),
        torch.full((count,), top_k, dtype=torch.int32),
        torch.full((count,), float(top_p)),
        torch.full((count,), float(min_p)),
        torch.arange(first_seed, first_seed + count) * 0x123456789 - 5,
        torch.arange(count) * 7 + (1 << 33),
    )


def kept_set(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which ids may be drawn, by sorting; bool [V]."""
    mass = ((logits.double() - logits.double().max()) / temperature).exp()
    order = logits.sort(descending=True, stable=True).indices[: top_k or None]
    heavy = mass[order]
    order = order[(heavy.cumsum(0) - heavy) < float(torch.tensor(top_p)) * heavy.sum()]
    return torch.zeros_like(mass, dtype=torch.bool).index_fill_(0, order, True) & (mass >= min_p)


SETTINGS = {
    "temperature": {"temperature": 0.7},
    "cold": {"temperature": 1e-5},
    "hot": {"temperature": 50.0},
    "top_k": {"top_k": 40},
    "top_k_1": {"top_k": 1},
    "most": {"top_k": 900, "top_p": 0.99},
    "top_p": {"top_p": 0.9},
    "small_top_p": {"top_p": 0.01},
    "wide_top_p": {"top_p": 0.9999, "temperature": 3.0},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
}


@cache
def reference_draw(size: int, name: str) -> tuple[Tensor, SamplingRows, Tensor]:
    count = 64 if size < 10000 else 8
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(count, size, generator=generator) * torch.linspace(0.5, 6, count)[:, None]
    logits[1::4, ::3] = -torch.inf
    if size > 1:
        logits[:, 0] = logits[:, 0].clamp(min=-10)
    rows = make_rows(count, **SETTINGS[name])
    return logits, rows, reference.sample(logits, rows)


@pytest.mark.parametrize("size", [1, 7, 1000, 50257])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_what_the_reference_draws(kernel, size, name):
    """The same token, but where u lies within float32's rounding of a border."""
    logits, rows, want = reference_draw(size, name)
    assert (kernel.sample(logits, rows) != want).sum() <= 1


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_only_what_may_be_drawn(kernel, name):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **SETTINGS[name]}
    logits = torch.randn(200, generator=torch.Generator().manual_seed(5)) * 3
    drawn = kernel.sample(logits.expand(4000, -1).contiguous(), make_rows(4000, **settings))
    may = kept_set(logits, **settings)
    assert may[drawn.long()].all()
    if may.sum() <= 20:  # all of a small set turn up
        heavy = (logits / settings["temperature"]).softmax(0)[may] > 0.01
        assert set(may.nonzero()[:, 0][heavy].tolist()) <= set(drawn.tolist())


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "all"])
def test_distribution(kernel, name):
    """Chi-square of 20,000 draws over up to 40 ids: below the 99.9 % quantile."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **SETTINGS[name]}
    logits = torch.randn(40, generator=torch.Generator().manual_seed(11))
    may = kept_set(logits, **settings)
    expected = torch.where(may, (logits.double() / settings["temperature"]).exp(), 0.0)
    expected *= 20_000 / expected.sum()
    drawn = kernel.sample(logits.expand(20_000, -1).contiguous(), make_rows(20_000, **settings, first_seed=99))
    observed = torch.bincount(drawn.long(), minlength=40).double()
    assert (observed[~may] == 0).all()
    freedom = int(may.sum()) - 1
    chi_square = ((observed - expected)[may] ** 2 / expected[may]).sum().item()
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5 + 8


def test_ties_go_to_the_lower_id(kernel):
    logits = torch.zeros(64, 1000)
    logits[:, 700:] = 1.0
    assert (kernel.sample(logits, make_rows(64, temperature=0)) == 700).all()
    assert kernel.sample(logits, make_rows(64, top_k=3)).unique().tolist() == [700, 701, 702]
    drawn = kernel.sample(logits, make_rows(64, top_k=300, top_p=0.1))  # 0.1 in float32 is a little more: 31 ids
    assert drawn.min() >= 700 and drawn.max() <= 730 and len(drawn.unique()) > 15
    flat = kernel.sample(torch.zeros(64, 5000), make_rows(64, top_p=0.01))
    assert flat.max() < 50 and len(flat.unique()) > 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 63, 100, 129])
def test_reports_a_sick_row_and_only_it(kernel, bad, where):
    logits = torch.randn(4, 130)
    want = kernel.sample(logits, make_rows(4, top_p=0.9))
    logits[2, where] = bad
    logits[3] = -torch.inf
    for temperature in (0.0, 1.0):
        got = kernel.sample(logits, make_rows(4, temperature=temperature, top_p=0.9))
        assert got[2:].tolist() == [-1, -1]
    assert got[:2].tolist() == want[:2].tolist()
    values, _, _, top = kernel.logprobs(logits, torch.zeros(4, dtype=torch.int32), 3)
    assert values[2:].isnan().all() and top[2:].isnan().all() and not values[:2].isnan().any()


def test_one_row_among_many_draws_the_same(kernel):
    logits = torch.randn(8, 3000) * 4
    rows = make_rows(8, top_p=0.95, top_k=200)
    together = kernel.sample(logits, rows)
    for r in range(8):
        alone = SamplingRows(*(getattr(rows, f)[r : r + 1] for f in ("temperature", "top_k", "top_p", "min_p", "seed", "position")))
        assert kernel.sample(logits[r : r + 1], alone).item() == together[r]


@pytest.mark.parametrize(("size", "top_n"), [(5, 5), (1000, 0), (1000, 8), (1000, 1000), (50257, 20)])
def test_logprobs(kernel, size, top_n):
    logits = (torch.randn(6, size, generator=torch.Generator().manual_seed(2)) * 3).round(decimals=1)
    tokens = torch.randint(0, size, (6,), dtype=torch.int32)
    for got, want in zip(kernel.logprobs(logits, tokens, top_n), reference.logprobs(logits, tokens, top_n), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
