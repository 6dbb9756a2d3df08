"""Paged and latent attention over the blocks of core/kv_spec, whose words of 4 bytes hold LANES numbers.

A program attends for BLOCK_M rows, which are tokens of one request times the HEADS query heads that share a kv head, over one part of the
context. K comes as words of LANES channels by tokens and V as words of LANES tokens by channels, so loads are wide and in order; the lanes
of a word are taken apart in registers and multiplied one after the other. Of the 4 lanes that are written below, those from LANES on repeat
the first and cost nothing. 8-bit numbers (MANTISSA above 0) become bfloat16 over a power of 2, UNIT, which queries and sums are given.

softmax in base 2, either online (FlashAttention) or, with UNIFIED, under a fixed maximum phi for each head (FlashDecoding++,
arXiv:2311.01282, section 3): no running maximum, no rescaling, parts are added. A row of scores that comes too near the end of the float
range (HIGH above phi) marks its part; where a part is marked or all scores of a row are too small (LOW), the rows are computed again,
online, in the kernel that adds the parts: inside the same launch, as a graph needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apportion.kernels.triton import float8

UNIT_WORDS = tl.constexpr(64)  # a block table's entries count 256 bytes
# Of scores above phi, exponents of 2. Probabilities under a fixed maximum, times 2^20 tokens and values up to 2^7, are finite below HIGH;
# float16 holds them below HIGH_16, and from LOW_16 on as exactly as it must.
HIGH, LOW = tl.constexpr(100.0), tl.constexpr(-60.0)
HIGH_16, LOW_16 = tl.constexpr(15.0), tl.constexpr(-6.0)


@triton.jit
def _lane(words, LANE: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr, dtype: tl.constexpr):
    """The number in lane LANE of each word, the lowest first."""
    if LANES == 4:
        return float8.lane(words, LANE, MANTISSA).to(dtype)
    elif LANES == 2:
        return ((words >> 16 * LANE) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    else:
        return words


@triton.jit
def _apart(x, LANES: tl.constexpr):
    """[M, N] -> 4 of [M, N / LANES]: columns i, i + LANES, .. for each lane i."""
    WORDS: tl.constexpr = x.shape[1] // LANES
    if LANES == 4:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], WORDS, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3
    elif LANES == 2:
        x0, x1 = tl.split(tl.reshape(x, (x.shape[0], WORDS, 2)))
        return x0, x1, x0, x0
    else:
        return x, x, x, x


@triton.jit
def _together(x, LANES: tl.constexpr):
    """The inverse of `_apart`."""
    ROWS: tl.constexpr = x[0].shape[0]
    COLUMNS: tl.constexpr = x[0].shape[1] * LANES
    if LANES == 4:
        return tl.reshape(tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])), (ROWS, COLUMNS))
    elif LANES == 2:
        return tl.reshape(tl.join(x[0], x[1]), (ROWS, COLUMNS))
    else:
        return x[0]


@triton.jit
def _block_start(table, tokens, inside, layer_words, BLOCK_SIZE: tl.constexpr):
    """Word offset in the arena of the layer's part of each token's block."""
    entries = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0)
    return entries.to(tl.int64) * UNIT_WORDS + layer_words


@triton.jit
def _fold(scores, largest, total, phi, UNIFIED: tl.constexpr, dtype: tl.constexpr):
    """One tile's probabilities -> (p, new largest, factor of what was summed before, new total). UNIFIED: largest of score - phi."""
    if UNIFIED:
        shifted = scores - phi[:, None]
        p = tl.exp2(tl.minimum(shifted, HIGH_16 if dtype == tl.float16 else HIGH))
        new = tl.maximum(largest, tl.max(shifted, axis=1))
        factor = tl.full(largest.shape, 1.0, tl.float32)
    else:
        new = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(scores - base[:, None])
        factor = tl.exp2(largest - base)
    return p, new, factor, total * factor + tl.sum(p, axis=1)


@triton.jit
def _add_values(p, words, sums, tokens, lowest, end, LANES: tl.constexpr, MANTISSA: tl.constexpr, dtype: tl.constexpr):
    """sums [M, COLUMNS] + p [M, N] times the values in words [N / LANES, COLUMNS], whose first lanes are of `tokens`. Those outside
    [lowest, end) are not there, and may be NaN."""
    parts = _apart(p.to(dtype), LANES)
    for i in tl.static_range(LANES):
        inside = (tokens + i >= lowest) & (tokens + i < end)
        values = tl.where(inside[:, None], _lane(words, i, LANES, MANTISSA, dtype), 0.0).to(dtype)
        sums = tl.dot(parts[i], values, sums, input_precision="ieee")
    return sums


@triton.jit
def _walk(
    q, arena, table, layer_words, kv_head, q_pos, phi, lowest, first, last, end,
    D: tl.constexpr, DV: tl.constexpr, K_HEADS: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIFIED: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """(sums [M, COLUMNS], largest, total) of the rows over tokens [first, last), a multiple of BLOCK_N from a multiple of it on.

    lowest, end: tokens outside are not there. q: channels of each lane. q_pos: positions of the rows, -1 for none.
    """
    K_ROWS: tl.constexpr = (D + LANES - 1) // LANES
    channel_rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    sums = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    largest, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    k_start = kv_head * (K_ROWS * BLOCK_SIZE)
    v_start = K_HEADS * (K_ROWS * BLOCK_SIZE) + kv_head * ((BLOCK_SIZE // LANES) * DV)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = (tokens >= lowest) & (tokens < end)
        place = _block_start(table, tokens, inside, layer_words, BLOCK_SIZE) + k_start + tokens % BLOCK_SIZE
        words = tl.load(
            arena + place[None, :] + channel_rows[:, None] * BLOCK_SIZE, mask=inside[None, :] & (channel_rows < K_ROWS)[:, None], other=0
        )
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(LANES):
            scores = tl.dot(q[i], _lane(words, i, LANES, MANTISSA, dtype), scores, input_precision="ieee")
        seen = inside[None, :] & (tokens[None, :] <= q_pos[:, None])
        if WINDOW > 0:
            seen = seen & (tokens[None, :] > q_pos[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        p, largest, factor, total = _fold(scores, largest, total, phi, UNIFIED, dtype)
        if not UNIFIED:
            sums = sums * factor[:, None]
        token_rows = start + tl.arange(0, BLOCK_N // LANES) * LANES
        some = (token_rows + (LANES - 1) >= lowest) & (token_rows < end)
        place = _block_start(table, token_rows, some, layer_words, BLOCK_SIZE) + v_start + (token_rows % BLOCK_SIZE) // LANES * DV
        words = tl.load(arena + place[:, None] + columns[None, :], mask=some[:, None] & (columns < DV)[None, :], other=0)
        sums = _add_values(p, words, sums, token_rows, lowest, end, LANES, MANTISSA, dtype)
    return sums, largest, total


@triton.jit
def _rows(item, items, starts, seq_lens, head_block, BLOCK_M: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """The rows of a program: (request, row in T, head in the group, position or -1, first and last position)."""
    request, first = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
    known = tl.maximum(request, 0)
    start, count = tl.load(starts + known), tl.load(starts + known + 1) - tl.load(starts + known)
    base = tl.load(seq_lens + known) - count
    m = tl.arange(0, BLOCK_M)
    token, head = first + m // HEADS, head_block * HEADS + m % HEADS
    live = (request >= 0) & (token < count) & (head < GROUP) & (m // HEADS < BLOCK_M // HEADS)
    position = tl.where(live, base + token, -1)
    return request, start + token, head, position, base + first, tl.max(position, axis=0)


@triton.jit
def _range(lowest_q, highest_q, split, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """(lowest token that is seen, first, last, end) of one split of the context; first and last are multiples of BLOCK_N."""
    lowest = tl.maximum(lowest_q - WINDOW + 1, 0) if WINDOW > 0 else 0
    end = highest_q + 1
    tile = lowest // BLOCK_N
    tiles = (end + BLOCK_N - 1) // BLOCK_N - tile
    each = (tiles + SPLITS - 1) // SPLITS
    first = tile + split * each
    last = tl.minimum(first + each, tile + tiles)
    return lowest, first * BLOCK_N, last * BLOCK_N, end


@triton.jit
def _queries(q, rows, q_stride, heads, position, scale, D: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr):
    """q of each lane, [M, ROWS], times scale (softmax in base 2)."""
    channels = tl.arange(0, ROWS) * LANES
    live = (position >= 0)[:, None]
    place = q + rows.to(tl.int64)[:, None] * q_stride + heads[:, None] * D + channels[None, :]
    q0 = (tl.load(place, mask=live & (channels < D)[None, :], other=0.0).to(tl.float32) * scale).to(dtype)
    q1, q2, q3 = q0, q0, q0
    if LANES >= 2:
        q1 = (tl.load(place + 1, mask=live & (channels + 1 < D)[None, :], other=0.0).to(tl.float32) * scale).to(dtype)
    if LANES == 4:
        q2 = (tl.load(place + 2, mask=live & (channels + 2 < D)[None, :], other=0.0).to(tl.float32) * scale).to(dtype)
        q3 = (tl.load(place + 3, mask=live & (channels + 3 < D)[None, :], other=0.0).to(tl.float32) * scale).to(dtype)
    return q0, q1, q2, q3


@triton.jit
def _unit(scales, index, UNIT: tl.constexpr, SCALED: tl.constexpr):
    """What stored numbers are multiplied by, of keys (index below K) or values."""
    if SCALED:
        return tl.load(scales + index) * UNIT
    else:
        return UNIT


@triton.jit
def _made_safe(
    sums, total, largest, q, q_stride, rows, heads, position, low, high, scale, arena, table, layer_words, kv_head, scales, recomputed,
    D: tl.constexpr, DV: tl.constexpr, K_HEADS: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr, UNIT: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """(sums, total) under a unified maximum; where a row left the range, those of another walk, online. recomputed: int32 counter."""
    SMALL: tl.constexpr = dtype == tl.float16
    out_of_range = (largest >= (HIGH_16 if SMALL else HIGH)) | (largest < (LOW_16 if SMALL else LOW)) | (total != total)
    bad = (position >= 0) & out_of_range
    num_bad = tl.sum(bad.to(tl.int32), axis=0)
    if num_bad > 0:
        tl.atomic_add(recomputed, num_bad)
        lowest, first, last, end = _range(low, high, 0, WINDOW, BLOCK_N, 1)
        k_scale = scale * _unit(scales, kv_head, UNIT, SCALED)
        queries = _queries(q, rows, q_stride, heads, position, k_scale, D, LANES, ROWS, dtype)
        safe_sums, _, safe_total = _walk(
            queries, arena, table, layer_words, kv_head, position, total, lowest, first, last, end,
            D, DV, K_HEADS, LANES, MANTISSA, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N, ROWS, COLUMNS, False, dtype,
        )  # fmt: skip
        sums = tl.where(bad[:, None], safe_sums * _unit(scales, K_HEADS + kv_head, UNIT, SCALED), sums)
        total = tl.where(bad, safe_total, total)
    return sums, total


@triton.jit
def paged_kernel(
    q, q_stride, arena, layer_words, scales, items, starts, seq_lens, table, table_stride, phi, scale, out, out_stride, marks, recomputed,
    D: tl.constexpr, DV: tl.constexpr, K_HEADS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr,
    UNIT: tl.constexpr, SCALED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTIAL: tl.constexpr, SPLITS: tl.constexpr, UNIFIED: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Grid (items, K * head blocks, splits). items int32 [N, 2]: request (-1: none), first of its rows. scales float32 [2, K] if SCALED.

    PARTIAL: out is float32 [N, K * GROUP, SPLITS, DV] (sums) and marks [.., SPLITS, 2] (largest, total); else out is [T, H * DV].
    """
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    item, kv_head = tl.program_id(0), tl.program_id(1) // HEAD_BLOCKS
    split = tl.program_id(2)
    request, rows, head, position, low, high = _rows(item, items, starts, seq_lens, tl.program_id(1) % HEAD_BLOCKS, BLOCK_M, HEADS, GROUP)
    if request >= 0:
        heads = kv_head * GROUP + head
        lowest, first, last, end = _range(low, high, split, WINDOW, BLOCK_N, SPLITS)
        k_scale = scale * _unit(scales, kv_head, UNIT, SCALED)
        queries = _queries(q, rows, q_stride, heads, position, k_scale, D, LANES, ROWS, dtype)
        live = position >= 0
        base = tl.load(phi + heads, mask=live, other=0.0) if UNIFIED else rows
        sums, largest, total = _walk(
            queries, arena, table + request.to(tl.int64) * table_stride, layer_words, kv_head, position, base, lowest, first, last, end,
            D, DV, K_HEADS, LANES, MANTISSA, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N, ROWS, COLUMNS, UNIFIED, dtype,
        )  # fmt: skip
        sums *= _unit(scales, K_HEADS + kv_head, UNIT, SCALED)
        columns = tl.arange(0, COLUMNS)
        mask = live[:, None] & (columns < DV)[None, :]
        if PARTIAL:
            part = (item.to(tl.int64) * (K_HEADS * GROUP) + heads) * SPLITS + split
            tl.store(out + part[:, None] * DV + columns[None, :], sums, mask=mask)
            tl.store(marks + part * 2, largest, mask=live)
            tl.store(marks + part * 2 + 1, total, mask=live)
        else:
            if UNIFIED:
                sums, total = _made_safe(
                    sums, total, largest, q, q_stride, rows, heads, position, low, high, scale, arena,
                    table + request.to(tl.int64) * table_stride, layer_words, kv_head, scales, recomputed, D, DV, K_HEADS, LANES, MANTISSA,
                    UNIT, SCALED, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N, ROWS, COLUMNS, dtype,
                )  # fmt: skip
            place = out + rows.to(tl.int64)[:, None] * out_stride + heads[:, None] * DV + columns[None, :]
            tl.store(place, (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    parts, marks, items, starts, out, out_stride, HEADS: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (items, H): parts of an online softmax, in order, into the item's row of out [T, H * DV]."""
    item, head = tl.program_id(0), tl.program_id(1)
    request = tl.load(items + 2 * item)
    if request >= 0:
        columns = tl.arange(0, BLOCK)
        part = (item.to(tl.int64) * HEADS + head) * SPLITS
        largest = -float("inf")
        for split in range(SPLITS):
            largest = tl.maximum(largest, tl.load(marks + (part + split) * 2))
        sums, total = tl.zeros((BLOCK,), tl.float32), 0.0
        for split in range(SPLITS):
            factor = tl.exp2(tl.load(marks + (part + split) * 2) - largest)
            sums += tl.load(parts + (part + split) * DV + columns, mask=columns < DV, other=0.0) * factor
            total += tl.load(marks + (part + split) * 2 + 1) * factor
        row = tl.load(starts + request).to(tl.int64) + tl.load(items + 2 * item + 1)
        tl.store(out + row * out_stride + head * DV + columns, (sums / total).to(out.dtype.element_ty), mask=columns < DV)


@triton.jit
def unified_combine_kernel(
    parts, marks, q, q_stride, arena, layer_words, scales, items, starts, seq_lens, table, table_stride, scale, out, out_stride, recomputed,
    D: tl.constexpr, DV: tl.constexpr, K_HEADS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr,
    UNIT: tl.constexpr, SCALED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Grid (items, K * head blocks): add the parts; where a row left the range, walk the context online. recomputed: int32 counter."""
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    item, kv_head = tl.program_id(0), tl.program_id(1) // HEAD_BLOCKS
    request, rows, head, position, low, high = _rows(item, items, starts, seq_lens, tl.program_id(1) % HEAD_BLOCKS, BLOCK_M, HEADS, GROUP)
    if request >= 0:
        heads, live, columns = kv_head * GROUP + head, position >= 0, tl.arange(0, COLUMNS)
        mask = live[:, None] & (columns < DV)[None, :]
        part = (item.to(tl.int64) * (K_HEADS * GROUP) + heads) * SPLITS
        sums = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        total, largest = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), -float("inf"), tl.float32)
        for split in range(SPLITS):
            sums += tl.load(parts + (part + split)[:, None] * DV + columns[None, :], mask=mask, other=0.0)
            largest = tl.maximum(largest, tl.load(marks + (part + split) * 2, mask=live, other=-float("inf")))
            total += tl.load(marks + (part + split) * 2 + 1, mask=live, other=0.0)
        sums, total = _made_safe(
            sums, total, largest, q, q_stride, rows, heads, position, low, high, scale, arena, table + request.to(tl.int64) * table_stride,
            layer_words, kv_head, scales, recomputed, D, DV, K_HEADS, LANES, MANTISSA, UNIT, SCALED, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N,
            ROWS, COLUMNS, dtype,
        )  # fmt: skip
        place = out + rows.to(tl.int64)[:, None] * out_stride + heads[:, None] * DV + columns[None, :]
        tl.store(place, (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _latent_dots(q, words, scores, LANES: tl.constexpr, MANTISSA: tl.constexpr, dtype: tl.constexpr):
    """scores + q [M, C] times the latents in words [N / LANES, C], for each lane."""
    s0, s1, s2, s3 = scores
    s0 = tl.dot(q, tl.trans(_lane(words, 0, LANES, MANTISSA, dtype)), s0, input_precision="ieee")
    if LANES >= 2:
        s1 = tl.dot(q, tl.trans(_lane(words, 1, LANES, MANTISSA, dtype)), s1)
    if LANES == 4:
        s2 = tl.dot(q, tl.trans(_lane(words, 2, LANES, MANTISSA, dtype)), s2)
        s3 = tl.dot(q, tl.trans(_lane(words, 3, LANES, MANTISSA, dtype)), s3)
    return s0, s1, s2, s3


@triton.jit
def _latent_scores(
    q_place, q_rope, arena, place, inside, live, scale, D: tl.constexpr, DV: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr,
    BLOCK_M: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROPE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Scores [M, WORDS * LANES] of the tokens whose latents begin at `place` of the arena; q_rope is scaled already."""
    rope = DV + tl.arange(0, ROPE)
    words = tl.load(arena + place[:, None] + rope[None, :], mask=inside[:, None] & (rope < D)[None, :], other=0)
    zero = tl.zeros((BLOCK_M, WORDS), tl.float32)
    scores = _latent_dots(q_rope, words, (zero, zero, zero, zero), LANES, MANTISSA, dtype)
    for column in range(0, COLUMNS, CHUNK):  # as one product, the queries alone would fill the registers
        part = column + tl.arange(0, CHUNK)
        q_part = tl.load(q_place + part[None, :], mask=live[:, None] & (part < DV)[None, :], other=0.0).to(tl.float32)
        keys = tl.load(arena + place[:, None] + part[None, :], mask=inside[:, None] & (part < DV)[None, :], other=0)
        scores = _latent_dots((q_part * scale).to(dtype), keys, scores, LANES, MANTISSA, dtype)
    return _together(scores, LANES)


@triton.jit
def latent_kernel(
    q, q_stride, q_head_stride, arena, layer_words, scales, items, starts, seq_lens, table, table_stride, scale, out, out_stride, marks,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr, UNIT: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROPE: tl.constexpr, PARTIAL: tl.constexpr, SPLITS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Grid (items, head blocks, splits). Keys are latents [D], whose first DV channels are the values too; the rest is padded to ROPE."""
    WORDS: tl.constexpr = BLOCK_N // LANES
    item, split = tl.program_id(0), tl.program_id(2)
    request, rows, head, position, low, high = _rows(item, items, starts, seq_lens, tl.program_id(1), BLOCK_M, HEADS, GROUP)
    if request >= 0:
        _, first, last, end = _range(low, high, split, 0, BLOCK_N, SPLITS)
        unit = _unit(scales, 0, UNIT, SCALED)
        columns, rope, live = tl.arange(0, COLUMNS), DV + tl.arange(0, ROPE), position >= 0
        q_place = q + rows.to(tl.int64)[:, None] * q_stride + head[:, None] * q_head_stride
        q_rope = tl.load(q_place + rope[None, :], mask=live[:, None] & (rope < D)[None, :], other=0.0).to(tl.float32)
        q_rope = (q_rope * (scale * unit)).to(dtype)
        sums = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        largest, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        table += request.to(tl.int64) * table_stride
        for start in range(first, last, BLOCK_N):
            tokens = start + tl.arange(0, WORDS) * LANES
            inside = tokens < end
            place = _block_start(table, tokens, inside, layer_words, BLOCK_SIZE) + (tokens % BLOCK_SIZE) // LANES * D
            scores = _latent_scores(
                q_place, q_rope, arena, place, inside, live, scale * unit, D, DV, LANES, MANTISSA, BLOCK_M, WORDS, COLUMNS, CHUNK, ROPE,
                dtype,
            )  # fmt: skip
            words = tl.load(arena + place[:, None] + columns[None, :], mask=inside[:, None] & (columns < DV)[None, :], other=0)
            scores = tl.where((start + tl.arange(0, BLOCK_N))[None, :] <= position[:, None], scores, -float("inf"))
            p, largest, factor, total = _fold(scores, largest, total, largest, False, dtype)
            sums = _add_values(p, words, sums * factor[:, None], tokens, 0, end, LANES, MANTISSA, dtype)
        sums *= unit
        mask = live[:, None] & (columns < DV)[None, :]
        if PARTIAL:
            part = (item.to(tl.int64) * GROUP + head) * SPLITS + split
            tl.store(out + part[:, None] * DV + columns[None, :], sums, mask=mask)
            tl.store(marks + part * 2, largest, mask=live)
            tl.store(marks + part * 2 + 1, total, mask=live)
        else:
            place = out + rows.to(tl.int64)[:, None] * out_stride + head[:, None] * DV + columns[None, :]
            tl.store(place, (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _slot(request_of, starts, seq_lens, table, table_stride, token, BLOCK_SIZE: tl.constexpr):
    """(request or -1, position, 256-byte unit of its block in the arena, slot in it) of row `token` of T."""
    request = tl.load(request_of + token)
    known = tl.maximum(request, 0)
    position = tl.load(seq_lens + known) - (tl.load(starts + known + 1) - token)
    entry = tl.load(table + known.to(tl.int64) * table_stride + tl.maximum(position, 0) // BLOCK_SIZE)
    return request, position, entry.to(tl.int64), position % BLOCK_SIZE


@triton.jit
def _keep(place, x, scale, mask, MANTISSA: tl.constexpr):
    """Store x over scale in the KV format."""
    if MANTISSA > 0:
        ratio = tl.div_rn(x.to(tl.float32), tl.zeros_like(x).to(tl.float32) + scale)
        tl.store(place, float8.encode(ratio, 448.0 if MANTISSA == 3 else 57344.0).to(tl.uint8), mask=mask)
    else:
        tl.store(place, x.to(place.dtype.element_ty), mask=mask)


@triton.jit
def write_kernel(
    qkv, stride, cos_sin, arena, layer_bytes, scales, request_of, starts, seq_lens, table, table_stride, q_norm, k_norm, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, BACK: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr, SCALED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Grid (T, H + 2K): normalize and rotate a head of q in place, or of k into the arena, with BACK in place too; copy a head of v there.

    arena: of the KV dtype, bytes where that has 8 bits. HALF: pairs that are rotated, in BLOCK lanes; the other channels of the head in
    REST lanes (a power of 2 each).
    """
    token, part = tl.program_id(0), tl.program_id(1)
    request, position, entry, slot = _slot(request_of, starts, seq_lens, table, table_stride, token, BLOCK_SIZE)
    K_ROWS: tl.constexpr = (D + LANES - 1) // LANES
    width: tl.constexpr = BLOCK_SIZE * LANES
    if request >= 0:
        layer = arena + (entry * 256 + layer_bytes) // (4 // LANES)
        row = qkv + token.to(tl.int64) * stride
        if part >= Q_HEADS + K_HEADS:
            v_head = part - Q_HEADS - K_HEADS
            channels = tl.arange(0, REST)
            v = tl.load(row + (Q_HEADS + K_HEADS) * D + v_head * DV + channels, mask=channels < DV, other=0.0)
            place = K_HEADS * K_ROWS * BLOCK_SIZE * LANES + v_head * BLOCK_SIZE * DV + slot // LANES * (DV * LANES) + slot % LANES
            v_scale = _unit(scales, K_HEADS + v_head, 1.0, SCALED)
            _keep(layer + place + channels * LANES, v, v_scale, channels < DV, MANTISSA)
        else:
            pairs = tl.arange(0, BLOCK)
            turned = pairs < HALF
            first = 2 * pairs if INTERLEAVED else pairs
            second = first + 1 if INTERLEAVED else first + HALF
            rest = 2 * HALF + tl.arange(0, REST)
            head = row + part * D
            a = tl.load(head + first, mask=turned, other=0.0).to(tl.float32)
            b = tl.load(head + second, mask=turned, other=0.0).to(tl.float32)
            c = tl.load(head + rest, mask=rest < D, other=0.0).to(tl.float32)
            if NORM:
                weight = q_norm if part < Q_HEADS else k_norm
                factor = 1.0 / tl.sqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0) + tl.sum(c * c, axis=0)) / D + eps)
                a *= factor * tl.load(weight + first, mask=turned, other=0.0)
                b *= factor * tl.load(weight + second, mask=turned, other=0.0)
                c *= factor * tl.load(weight + rest, mask=rest < D, other=0.0)
            angles = cos_sin + position.to(tl.int64) * (2 * HALF) + pairs
            cos, sin = tl.load(angles, mask=turned, other=0.0), tl.load(angles + HALF, mask=turned, other=0.0)
            a, b = a * cos - b * sin, b * cos + a * sin
            if (part < Q_HEADS) | BACK:
                tl.store(head + first, a.to(qkv.dtype.element_ty), mask=turned)
                tl.store(head + second, b.to(qkv.dtype.element_ty), mask=turned)
                if NORM:
                    tl.store(head + rest, c.to(qkv.dtype.element_ty), mask=rest < D)
            if part >= Q_HEADS:
                k = layer + (part - Q_HEADS) * (K_ROWS * BLOCK_SIZE * LANES) + slot * LANES
                k_scale = _unit(scales, part - Q_HEADS, 1.0, SCALED)
                _keep(k + first // LANES * width + first % LANES, a, k_scale, turned, MANTISSA)
                _keep(k + second // LANES * width + second % LANES, b, k_scale, turned, MANTISSA)
                _keep(k + rest // LANES * width + rest % LANES, c, k_scale, rest < D, MANTISSA)


@triton.jit
def write_latent_kernel(
    latent, stride, arena, layer_bytes, scales, request_of, starts, seq_lens, table, table_stride,
    D: tl.constexpr, LANES: tl.constexpr, MANTISSA: tl.constexpr, SCALED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (T,): latent [T, D] into the arena, which is of the KV dtype, bytes where that has 8 bits."""
    token = tl.program_id(0)
    request, _, entry, slot = _slot(request_of, starts, seq_lens, table, table_stride, token, BLOCK_SIZE)
    if request >= 0:
        channels = tl.arange(0, BLOCK)
        values = tl.load(latent + token.to(tl.int64) * stride + channels, mask=channels < D, other=0.0)
        place = arena + (entry * 256 + layer_bytes) // (4 // LANES) + slot // LANES * (D * LANES) + slot % LANES
        scale = _unit(scales, 0, 1.0, SCALED)
        _keep(place + channels * LANES, values, scale, channels < D, MANTISSA)
