"""Sampling and log-probabilities. The random number of a token is a function of (seed, position) alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apportion.core.errors import InternalError
from apportion.kernels.ops import SamplingRows

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011): counter [R, 4] and key [R, 2], 32-bit words in uint64 -> 4 words [R, 4]."""
    c0, c1, c2, c3 = counter.T
    k0, k1 = key.T
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3), axis=-1)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """seed, position int64 [R] -> float64 [R] in [0, 1), a multiple of 2^-24.

    Philox4x32-10 with key (seed low, seed high) and counter (position low, position high, 0, 0); the first word >> 8.
    """
    words = [x.numpy().astype(np.int64).view(np.uint64) for x in (position, seed)]
    (p_low, p_high), (s_low, s_high) = ((w & _LOW, w >> _HALF) for w in words)
    zero = np.zeros_like(p_low)
    first = philox4x32(np.stack((p_low, p_high, zero, zero), -1), np.stack((s_low, s_high), -1))[:, 0]
    return torch.from_numpy((first >> np.uint64(8)).astype(np.float64) * 2.0**-24)


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    ids = torch.from_numpy(logits.numpy().argmax(axis=-1))  # numpy promises the first of equals, and a NaN where there is one
    fails = ~logits.gather(1, ids[:, None])[:, 0].isfinite()
    drawn = (~fails & (rows.temperature > 0)).nonzero()[:, 0]
    u = uniform(rows.seed[drawn], rows.position[drawn])
    for r, chance in zip(drawn.tolist(), u.tolist(), strict=True):
        limits = (float(rows.temperature[r]), int(rows.top_k[r]), float(rows.top_p[r]), float(rows.min_p[r]))
        ids[r] = _draw(logits[r], *limits, chance)
    return ids.masked_fill_(fails, -1).int()


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    mass = ((logits.double() - logits.max().double()) / temperature).exp()  # the largest has mass 1
    kept = mass >= min_p
    if 0 < top_k < len(mass) or top_p < 1:
        order = mass.sort(descending=True, stable=True).indices[: top_k or None]
        before = mass[order].cumsum(0) - mass[order]
        order = order[before < top_p * mass[order].sum()]
        kept &= torch.zeros_like(kept).index_fill_(0, order, True)
    cumulative = torch.where(kept, mass, 0.0).cumsum(0)
    return int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))


def apply_bitmask(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    size = logits.shape[1]
    if masks.shape[1] * 8 < size:
        raise InternalError(f"a mask of {masks.shape[1]} bytes does not cover a vocabulary of {size} tokens")
    allowed = torch.from_numpy(np.unpackbits(masks.numpy(), axis=1, bitorder="little", count=size))
    logits[rows.long()] = logits[rows.long()].masked_fill(allowed == 0, -torch.inf)


def logprobs(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = logits.log_softmax(dim=-1)
    chosen = values.gather(1, token_ids.long()[:, None])
    rank = (logits > logits.gather(1, token_ids.long()[:, None])).sum(dim=1) + 1
    top = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_n]
    return chosen[:, 0], rank.int(), top.int(), values.gather(1, top)
