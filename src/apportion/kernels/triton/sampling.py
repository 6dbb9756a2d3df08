"""Sampling as kernels/ops states it, one program to a row of logits, without a sort and without a sync.

The kept set of top_k and top_p is a threshold on the logits' bits, found bit by bit from the highest: the largest key whose upper side is
still too small. Equal logits at the threshold are kept from the lowest id on. Sums are float64, blocks of ids in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apportion.core.errors import InternalError
from apportion.kernels.ops import SamplingRows
from apportion.kernels.reference import sampling as reference


@triton.jit
def _load(logits, start, vocab, BLOCK: tl.constexpr):
    ids = start + tl.arange(0, BLOCK)
    return ids, tl.load(logits + ids, mask=ids < vocab, other=-float("inf"))


@triton.jit
def _key(values):
    """uint32 that orders as the floats do; both zeros are one."""
    bits = (values + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _mass(values, largest, temperature):
    return tl.exp((values.to(tl.float64) - largest.to(tl.float64)) / temperature)


@triton.jit
def _count_above(logits, vocab, key, BLOCK: tl.constexpr):
    """(how many logits lie above `key`, how many on it)"""
    above, on = 0, 0
    for start in range(0, vocab, BLOCK):
        ids, values = _load(logits, start, vocab, BLOCK)
        keys = _key(values)
        inside = ids < vocab
        above += tl.sum(((keys > key) & inside).to(tl.int32), axis=0)
        on += tl.sum(((keys == key) & inside).to(tl.int32), axis=0)
    return above, on


@triton.jit
def _mass_above(logits, vocab, key, largest, temperature, INCLUSIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Mass of the logits above `key`, or INCLUSIVE of those on it."""
    total = tl.zeros((), tl.float64)
    for start in range(0, vocab, BLOCK):
        ids, values = _load(logits, start, vocab, BLOCK)
        keys = _key(values)
        counted = (keys >= key if INCLUSIVE else keys > key) & (ids < vocab)
        total += tl.sum(tl.where(counted, _mass(values, largest, temperature), 0.0), axis=0)
    return total


@triton.jit
def _value_of(key):
    return tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _top_k(logits, vocab, k, BLOCK: tl.constexpr):
    """(key of the k-th largest, how many equal to it are kept): the largest key that at least k logits reach."""
    key = tl.zeros((), tl.uint32)
    for bit in range(32):
        candidate = key | (tl.full((), 0x80000000, tl.uint32) >> bit)
        above, on = _count_above(logits, vocab, candidate, BLOCK)
        key = tl.where(above + on >= k, candidate, key)
    above, on = _count_above(logits, vocab, key, BLOCK)
    return key, k - above


@triton.jit
def _top_p(logits, vocab, top_p, key, kept_on_key, largest, temperature, BLOCK: tl.constexpr):
    """The same for the smallest set, among what (key, kept_on_key) keep, whose mass reaches top_p of theirs.

    A logit stays if the mass before it, in descending order, is below the target: of the keys that satisfy this we want the least.
    """
    edge = tl.where(key == 0, 0.0, _mass(_value_of(key), largest, temperature))  # 0 is the key of no number: nothing was cut off
    target = top_p.to(tl.float64) * (_mass_above(logits, vocab, key, largest, temperature, False, BLOCK) + kept_on_key * edge)
    low = tl.zeros((), tl.uint32)
    for bit in range(32):  # `low` grows to the largest key below which the mass is already reached
        candidate = low | (tl.full((), 0x80000000, tl.uint32) >> bit)
        reached = _mass_above(logits, vocab, candidate, largest, temperature, True, BLOCK) >= target
        low = tl.where(reached, candidate, low)
    threshold = tl.maximum(low, key)
    before = _mass_above(logits, vocab, threshold, largest, temperature, False, BLOCK)
    one = _mass(_value_of(threshold), largest, temperature)
    _, on = _count_above(logits, vocab, threshold, BLOCK)
    fitting = tl.ceil((target - before) / one).to(tl.int32)
    limit = tl.where(threshold == key, kept_on_key, on)
    return threshold, tl.minimum(tl.maximum(fitting, 1), limit)


@triton.jit
def _kept(ids, values, vocab, key, kept_on_key, seen_on_key, min_p, largest, temperature):
    """(masses of the kept, 0 for others; how many on the key were seen)"""
    keys = _key(values)
    mass = _mass(values, largest, temperature)
    on = ((keys == key) & (ids < vocab)).to(tl.int32)
    rank = seen_on_key + tl.cumsum(on, axis=0)
    kept = (ids < vocab) & ((keys > key) | ((on > 0) & (rank <= kept_on_key))) & (mass >= min_p)
    return tl.where(kept, mass, 0.0), seen_on_key + tl.sum(on, axis=0)


@triton.jit
def _draw(logits, vocab, largest, temperature, top_k, top_p, min_p, u, BLOCK: tl.constexpr):
    key, kept_on_key = tl.zeros((), tl.uint32), vocab
    if (top_k > 0) & (top_k < vocab):
        key, kept_on_key = _top_k(logits, vocab, top_k, BLOCK)
    if top_p < 1:
        key, kept_on_key = _top_p(logits, vocab, top_p, key, kept_on_key, largest, temperature, BLOCK)
    total, seen = tl.zeros((), tl.float64), 0
    for start in range(0, vocab, BLOCK):
        ids, values = _load(logits, start, vocab, BLOCK)
        masses, seen = _kept(ids, values, vocab, key, kept_on_key, seen, min_p, largest, temperature)
        total += tl.sum(masses, axis=0)
    goal, before, token = u * total, tl.zeros((), tl.float64), vocab
    last, seen = 0, 0
    for start in range(0, vocab, BLOCK):
        ids, values = _load(logits, start, vocab, BLOCK)
        masses, seen = _kept(ids, values, vocab, key, kept_on_key, seen, min_p, largest, temperature)
        cumulative = before + tl.cumsum(masses, axis=0)
        token = tl.minimum(token, tl.min(tl.where((cumulative > goal) & (masses > 0), ids, vocab), axis=0))
        last = tl.maximum(last, tl.max(tl.where(masses > 0, ids, 0), axis=0))
        before += tl.sum(masses, axis=0)
    return tl.minimum(token, last)  # rounding may leave the goal just above the last sum


@triton.jit(do_not_specialize=["vocab"])
def sample_kernel(logits, stride, vocab, temperatures, top_ks, top_ps, min_ps, seeds, positions, out, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    largest, token, bad = -float("inf"), vocab, 0
    for start in range(0, vocab, BLOCK):
        ids, values = _load(logits, start, vocab, BLOCK)
        bad += tl.sum((values != values).to(tl.int32), axis=0)
        best = tl.max(values, axis=0)
        where = tl.min(tl.where(values == best, ids, vocab), axis=0)
        token = tl.where(best > largest, where, token)
        largest = tl.maximum(largest, best)
    temperature = tl.load(temperatures + row)
    if (bad > 0) | (tl.abs(largest) == float("inf")):
        token = -1
    elif temperature > 0:
        position = tl.load(positions + row)
        low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
        zero = tl.zeros((), tl.uint32)
        word, _, _, _ = tl.philox(tl.load(seeds + row), low, high, zero, zero)
        u = (word >> 8).to(tl.float64) * 5.9604644775390625e-08  # 2^-24
        token = _draw(
            logits,
            vocab,
            largest,
            temperature.to(tl.float64),
            tl.load(top_ks + row),
            tl.load(top_ps + row),
            tl.load(min_ps + row),
            u,
            BLOCK,
        )
    tl.store(out + row, token)


@triton.jit
def bitmask_kernel(logits, stride, vocab, rows, masks, mask_stride, BLOCK: tl.constexpr):
    entry = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    byte = tl.load(masks + entry.to(tl.int64) * mask_stride + ids // 8, mask=inside, other=255)
    excluded = ((byte >> (ids % 8).to(tl.uint8)) & 1) == 0
    row = tl.load(rows + entry).to(tl.int64)
    tl.store(logits + row * stride + ids, tl.full((BLOCK,), -float("inf"), tl.float32), mask=inside & excluded)


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    count, vocab = logits.shape
    out = torch.empty(count, dtype=torch.int32, device=logits.device)
    if count:
        columns = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.position)
        sample_kernel[(count,)](
            logits, logits.stride(0), vocab, *(column.to(logits.device, non_blocking=True) for column in columns), out,
            BLOCK=min(2048, triton.next_power_of_2(vocab)), num_warps=8,
        )  # fmt: skip
    return out


def apply_bitmask(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Errors: InternalError where a mask is shorter than the vocabulary."""
    size, mask_bytes = logits.shape[1], masks.shape[1]
    if mask_bytes * 8 < size:
        raise InternalError(f"a mask of {mask_bytes} bytes does not cover a vocabulary of {size} tokens")
    block = min(1024, triton.next_power_of_2(size))
    if len(rows):
        bitmask_kernel[(len(rows), triton.cdiv(size, block))](logits, logits.stride(0), size, rows, masks, masks.stride(0), BLOCK=block)


def logprobs(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The library's, on the device: few requests ask for them, and a stable sort is what it has."""
    return reference.logprobs(logits, token_ids, top_n)
