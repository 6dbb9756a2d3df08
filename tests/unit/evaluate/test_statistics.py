"""Intervals against closed forms, published numbers and their own promise: that they cover."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from apportion.evaluate.statistics import bootstrap, ratio, wilson


@pytest.mark.parametrize(
    ("right", "num", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)],
)
def test_wilson_gives_newcombes_numbers(right, num, low, high):
    """Newcombe, Statistics in Medicine 1998, table I, method 3."""
    found = wilson(right, num)
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
    assert found.value == right / num and found.num == num


def test_wilson_of_nothing_has_no_value():
    assert wilson(0, 0).value is None and wilson(0, 0).low is None


def test_wilson_bounds_solve_its_equation():
    """The bounds are the p at which the score test is just significant: |p^ - p| = z sqrt(p (1 - p) / n)."""
    found = wilson(7, 50, level=0.9)
    z = NormalDist().inv_cdf(0.95)
    for p in (found.low, found.high):
        assert abs(7 / 50 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 50))


def test_many_clusters_give_the_normal_interval():
    """With 4,000 clusters of one the interval of a mean is mean +- z s / sqrt(n) to a few per cent of its width."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    found = bootstrap(np.stack([values, np.ones_like(values)], axis=1), ratio(), seed=2)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean()) and found.method == "bca" and found.num_clusters == 4000
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_clusters_are_drawn_whole():
    """100 copies of each of 25 values are 25 observations, not 2,500: the interval is ten times as wide as that of independent ones."""
    values = np.random.default_rng(3).normal(size=25)
    whole = bootstrap(np.stack([100 * values, np.full(25, 100.0)], axis=1), ratio())
    copies = np.repeat(values, 100)
    apart = bootstrap(np.stack([copies, np.ones(2500)], axis=1), ratio())
    assert (whole.high - whole.low) / (apart.high - apart.low) == pytest.approx(10, rel=0.15)


def test_pairing_takes_the_common_part_out():
    """Two systems that differ by 0.1 on every item: the paired difference is certain though each mean is not."""
    own = np.random.default_rng(4).normal(3, 1, 60)
    paired = bootstrap(np.stack([(own + 0.1) - own, np.ones(60)], axis=1), ratio())
    single = bootstrap(np.stack([own, np.ones(60)], axis=1), ratio())
    assert paired.low == pytest.approx(0.1) and paired.high == pytest.approx(0.1) and single.high - single.low > 0.3


def test_it_is_bca_as_efron_and_tibshirani_compute_it():
    """Equations 14.9 to 14.15 of An Introduction to the Bootstrap, written out by loops over the same resamples."""
    values = np.random.default_rng(5).exponential(size=30)
    clusters = np.stack([values, np.ones(30)], axis=1)
    found = bootstrap(clusters, ratio(), num_resamples=4000, seed=6)
    drawn = np.random.default_rng(6).integers(30, size=(4000, 30))
    means = sorted(values[row].mean() for row in drawn)
    normal = NormalDist()
    bias = normal.inv_cdf(sum(mean < values.mean() for mean in means) / 4000)
    left_out = [np.delete(values, i).mean() for i in range(30)]
    pull = [np.mean(left_out) - each for each in left_out]
    acceleration = sum(p**3 for p in pull) / (6 * sum(p**2 for p in pull) ** 1.5)
    for bound, q in ((found.low, 0.025), (found.high, 0.975)):
        z = bias + normal.inv_cdf(q)
        assert bound == pytest.approx(np.quantile(means, normal.cdf(bias + z / (1 - acceleration * z))), rel=1e-6)
    assert acceleration > 0.02  # skewed: the percentile interval would be another
    assert found.low != pytest.approx(np.quantile(means, 0.025), rel=1e-4)


def test_intervals_cover():
    """Of 800 intervals of the mean of 60 skewed values, near 95 in 100 hold the true one."""
    rng = np.random.default_rng(7)
    held = 0
    for i in range(800):
        values = rng.gamma(4.0, size=60)
        found = bootstrap(np.stack([values, np.ones(60)], axis=1), ratio(), num_resamples=1000, seed=i)
        held += found.low <= 4.0 <= found.high
    assert 0.925 <= held / 800 <= 0.97


def test_what_cannot_be_known_is_none():
    assert bootstrap(np.ones((1, 2)), ratio()).low is None
    assert bootstrap(np.zeros((0, 2)), ratio()).value is None
    assert bootstrap(np.array([[1.0, 0.0], [2.0, 0.0]]), ratio()).value is None
    open_above = bootstrap(np.array([[1.0, 0.0]] * 3 + [[1.0, 1.0]]), ratio())  # a third of the resamples divides by nothing
    assert open_above.value == 4.0 and open_above.high is None


def test_equal_clusters_leave_no_doubt():
    found = bootstrap(np.tile([0.5, 1.0], (9, 1)), ratio())
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)
