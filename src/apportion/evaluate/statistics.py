"""How sure a number is: Wilson's interval for proportions, the BCa bootstrap for ratios of sums over clusters.

Knows arrays of numbers; knows no model, text or task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL, NUM_RESAMPLES = 0.95, 10_000
_INDICES_AT_ONCE = 4_000_000  # of a slice of resamples
_NORMAL = NormalDist()

Statistic = Callable[[np.ndarray], np.ndarray]  # totals of all clusters [B, K] -> [B]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and the interval that holds the true one with probability `level`; low and high are None where there is no interval.

    num: what was counted or averaged over. num_clusters: how many independent groups of these were resampled. method: 'wilson', 'bca'
    or 'none' (a single cluster says nothing about its own spread).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    level: float = LEVEL
    method: str = "none"
    num: int = 0
    num_clusters: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def wilson(num_right: int, num: int, level: float = LEVEL) -> Estimate:
    """The score interval of a proportion (Wilson, JASA 1927); it stays in [0, 1] and has width at 0 and at 1."""
    if num == 0:
        return Estimate(None, level=level)
    z = _NORMAL.inv_cdf((1 + level) / 2)
    p = num_right / num
    centre = (p + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    low = 0.0 if num_right == 0 else centre - half
    return Estimate(p, low, 1.0 if num_right == num else centre + half, level, "wilson", num, num)


def ratio(numerator: int = 0, denominator: int = 1) -> Statistic:
    """The quotient of two columns of totals; 0 / 0 is not a number, x / 0 infinite."""

    def statistic(totals_BK: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return totals_BK[:, numerator] / totals_BK[:, denominator]

    return statistic


def bootstrap(
    clusters_CK: np.ndarray,
    statistic: Statistic,
    *,
    num: int = 0,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """`statistic` of the totals of C clusters, with its bias-corrected accelerated interval (Efron, JASA 1987).

    clusters [C, K]: sums of each cluster (a document, a task item), so that what is paired stays paired and what hangs together is
    drawn together. The interval is NaN-free: a bound that is not finite is None.
    """
    clusters_CK = np.asarray(clusters_CK, dtype=np.float64)
    count = len(clusters_CK)
    if count == 0:
        return Estimate(None, level=level, num=num)
    totals_K = clusters_CK.sum(axis=0)
    value = float(statistic(totals_K[None])[0])
    if count == 1 or not math.isfinite(value):
        return Estimate(_finite(value), level=level, num=num, num_clusters=count)
    resampled = np.sort(_resample(clusters_CK, statistic, num_resamples, np.random.default_rng(seed)))
    resampled = resampled[~np.isnan(resampled)]
    left_out = statistic(totals_K - clusters_CK)
    low, high = (_quantile(resampled, q) for q in _bca_quantiles(value, resampled, left_out[np.isfinite(left_out)], level))
    return Estimate(value, _finite(low), _finite(high), level, "bca", num, count)


def _resample(clusters_CK: np.ndarray, statistic: Statistic, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    count = len(clusters_CK)
    slice_len = max(1, _INDICES_AT_ONCE // count)
    slices = []
    for first in range(0, num_resamples, slice_len):
        drawn = rng.integers(count, size=(min(slice_len, num_resamples - first), count))
        slices.append(statistic(np.stack([column[drawn].sum(axis=1) for column in clusters_CK.T], axis=1)))
    return np.concatenate(slices)


def _bca_quantiles(value: float, resampled: np.ndarray, left_out: np.ndarray, level: float) -> tuple[float, float]:
    """Which quantiles of the resampled values bound the interval: bias from their median, acceleration from the jackknife."""
    below = (np.sum(resampled < value) + 0.5 * np.sum(resampled == value)) / len(resampled)
    edge = 0.5 / len(resampled)
    bias = _NORMAL.inv_cdf(min(max(float(below), edge), 1 - edge))
    pull = left_out.mean() - left_out
    spread = float(np.sum(pull**2))
    acceleration = float(np.sum(pull**3)) / (6 * spread**1.5) if spread > 0 else 0.0

    def adjusted(q: float) -> float:
        z = bias + _NORMAL.inv_cdf(q)
        return _NORMAL.cdf(bias + z / (1 - acceleration * z))

    return adjusted((1 - level) / 2), adjusted((1 + level) / 2)


def _quantile(ordered: np.ndarray, q: float) -> float:
    """Of sorted values, linear between neighbours; exact where they are equal or infinite."""
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return float(low if low == high else low + (high - low) * (place - math.floor(place)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
