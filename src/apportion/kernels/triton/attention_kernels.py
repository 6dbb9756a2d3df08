"""Paged and latent attention over the blocks of core/kv_spec, whose words of 4 bytes hold LANES numbers.

A program attends for BLOCK_M rows, which are tokens of one request times the HEADS query heads that share a kv head, over one part of the
context. K comes as words of LANES channels by tokens and V as words of LANES tokens by channels, so loads are wide and in order; the lanes
of a word are taken apart in registers and multiplied one after the other.

softmax in base 2, either online (FlashAttention) or, with UNIFIED, under a fixed maximum phi for each head (FlashDecoding++,
arXiv:2311.01282, section 3): no running maximum, no rescaling, parts are added. A row of scores that comes too near the end of the float
range (`HIGH` above phi) marks its part; where a part is marked or the sum of a row is too small (`LOW`), the rows are computed again,
online, in the kernel that adds the parts: inside the same launch, as a graph needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT_WORDS = tl.constexpr(64)  # a block table's entries count 256 bytes
HIGH = tl.constexpr(100.0)  # exp2 of it, times 2^20 tokens and values up to 2^7, is finite
LOW = tl.constexpr(2.0**-60)


@triton.jit
def _lane(words, LANE: tl.constexpr, dtype: tl.constexpr):
    """The 16-bit number in lane 0 (low) or 1 of each word."""
    return ((words >> 16 * LANE) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _block_start(table, tokens, inside, layer_words, BLOCK_SIZE: tl.constexpr):
    """Word offset in the arena of the layer's part of each token's block."""
    entries = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0)
    return entries.to(tl.int64) * UNIT_WORDS + layer_words


@triton.jit
def _fold(scores, largest, total, phi, UNIFIED: tl.constexpr):
    """One tile's probabilities -> (p, new largest, factor of what was summed before, new total). UNIFIED: largest of score - phi."""
    if UNIFIED:
        shifted = scores - phi[:, None]
        p = tl.exp2(tl.minimum(shifted, HIGH))
        new = tl.maximum(largest, tl.max(shifted, axis=1))
        factor = tl.full(largest.shape, 1.0, tl.float32)
    else:
        new = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(scores - base[:, None])
        factor = tl.exp2(largest - base)
    return p, new, factor, total * factor + tl.sum(p, axis=1)


@triton.jit
def _walk(
    q0, q1, arena, table, layer_words, kv_head, q_pos, phi, lowest, first, last, end,
    D: tl.constexpr, DV: tl.constexpr, K_HEADS: tl.constexpr, LANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIFIED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """(sums [M, COLUMNS], largest, total) of the rows over tokens [first, last), a multiple of BLOCK_N from a multiple of it on.

    lowest, end: tokens outside are not there. q1: channels of lane 1. q_pos: positions of the rows, -1 for none.
    """
    K_ROWS: tl.constexpr = (D + LANES - 1) // LANES
    PAIRS: tl.constexpr = BLOCK_N // LANES
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
        if LANES == 2:
            scores = tl.dot(q0, _lane(words, 0, dtype))
            scores = tl.dot(q1, _lane(words, 1, dtype), scores)
        else:
            scores = tl.dot(q0, words, input_precision="ieee")
        seen = inside[None, :] & (tokens[None, :] <= q_pos[:, None])
        if WINDOW > 0:
            seen = seen & (tokens[None, :] > q_pos[:, None] - WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        p, largest, factor, total = _fold(scores, largest, total, phi, UNIFIED)
        if not UNIFIED:
            sums = sums * factor[:, None]
        token_rows = start + tl.arange(0, PAIRS) * LANES
        some = (token_rows + (LANES - 1) >= lowest) & (token_rows < end)
        place = _block_start(table, token_rows, some, layer_words, BLOCK_SIZE) + v_start + (token_rows % BLOCK_SIZE) // LANES * DV
        words = tl.load(arena + place[:, None] + columns[None, :], mask=some[:, None] & (columns < DV)[None, :], other=0)
        if LANES == 2:
            p0, p1 = tl.split(tl.reshape(p.to(dtype), (BLOCK_M, PAIRS, 2)))
            v0 = tl.where((token_rows >= lowest)[:, None], _lane(words, 0, dtype), 0.0).to(dtype)
            v1 = tl.where((token_rows + 1 < end)[:, None], _lane(words, 1, dtype), 0.0).to(dtype)
            sums = tl.dot(p0, v0, sums)
            sums = tl.dot(p1, v1, sums)
        else:
            sums = tl.dot(p, words, sums, input_precision="ieee")
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
    """q of lane 0 and of lane 1, [M, ROWS] each, times scale (softmax in base 2)."""
    channels = tl.arange(0, ROWS) * LANES
    live = (position >= 0)[:, None]
    place = q + rows.to(tl.int64)[:, None] * q_stride + heads[:, None] * D + channels[None, :]
    q0 = (tl.load(place, mask=live & (channels < D)[None, :], other=0.0).to(tl.float32) * scale).to(dtype)
    q1 = q0
    if LANES == 2:
        q1 = (tl.load(place + 1, mask=live & (channels + 1 < D)[None, :], other=0.0).to(tl.float32) * scale).to(dtype)
    return q0, q1


@triton.jit
def paged_kernel(
    q, q_stride, arena, layer_words, items, starts, seq_lens, table, table_stride, phi, scale, out, out_stride, marks,
    D: tl.constexpr, DV: tl.constexpr, K_HEADS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTIAL: tl.constexpr, SPLITS: tl.constexpr, UNIFIED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Grid (items, K * head blocks, splits). items int32 [N, 2]: request (-1: none), first of its rows.

    PARTIAL: out is float32 [N, K * GROUP, SPLITS, DV] (sums) and marks [.., SPLITS, 2] (largest, total); else out is [T, H * DV].
    """
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    item, kv_head = tl.program_id(0), tl.program_id(1) // HEAD_BLOCKS
    split = tl.program_id(2)
    request, rows, head, position, low, high = _rows(item, items, starts, seq_lens, tl.program_id(1) % HEAD_BLOCKS, BLOCK_M, HEADS, GROUP)
    if request >= 0:
        heads = kv_head * GROUP + head
        lowest, first, last, end = _range(low, high, split, WINDOW, BLOCK_N, SPLITS)
        q0, q1 = _queries(q, rows, q_stride, heads, position, scale, D, LANES, ROWS, dtype)
        live = position >= 0
        base = tl.load(phi + heads, mask=live, other=0.0) if UNIFIED else rows
        sums, largest, total = _walk(
            q0, q1, arena, table + request.to(tl.int64) * table_stride, layer_words, kv_head, position, base, lowest, first, last, end,
            D, DV, K_HEADS, LANES, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N, ROWS, COLUMNS, UNIFIED, dtype,
        )  # fmt: skip
        columns = tl.arange(0, COLUMNS)
        mask = live[:, None] & (columns < DV)[None, :]
        if PARTIAL:
            part = (item.to(tl.int64) * (K_HEADS * GROUP) + heads) * SPLITS + split
            tl.store(out + part[:, None] * DV + columns[None, :], sums, mask=mask)
            tl.store(marks + part * 2, largest, mask=live)
            tl.store(marks + part * 2 + 1, total, mask=live)
        else:
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
    parts, marks, q, q_stride, arena, layer_words, items, starts, seq_lens, table, table_stride, scale, out, out_stride, recomputed,
    D: tl.constexpr, DV: tl.constexpr, K_HEADS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, dtype: tl.constexpr,
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
        bad = live & ((largest >= HIGH) | (total < LOW) | (total != total))
        num_bad = tl.sum(bad.to(tl.int32), axis=0)
        if num_bad > 0:
            tl.atomic_add(recomputed, num_bad)
            lowest, first, last, end = _range(low, high, 0, WINDOW, BLOCK_N, 1)
            q0, q1 = _queries(q, rows, q_stride, heads, position, scale, D, LANES, ROWS, dtype)
            safe_sums, _, safe_total = _walk(
                q0, q1, arena, table + request.to(tl.int64) * table_stride, layer_words, kv_head, position, total, lowest, first, last, end,
                D, DV, K_HEADS, LANES, BLOCK_SIZE, WINDOW, BLOCK_M, BLOCK_N, ROWS, COLUMNS, False, dtype,
            )  # fmt: skip
            sums = tl.where(bad[:, None], safe_sums, sums)
            total = tl.where(bad, safe_total, total)
        place = out + rows.to(tl.int64)[:, None] * out_stride + heads[:, None] * DV + columns[None, :]
        tl.store(place, (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _latent_scores(
    q_place, q_rope, arena, place, inside, live, scale, D: tl.constexpr, DV: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROPE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Scores [M, PAIRS] of the tokens in lane 0 and in lane 1, whose latents begin at `place` of the arena; q_rope is scaled already."""
    rope = DV + tl.arange(0, ROPE)
    words = tl.load(arena + place[:, None] + rope[None, :], mask=inside[:, None] & (rope < D)[None, :], other=0)
    s0, s1 = tl.zeros((BLOCK_M, PAIRS), tl.float32), tl.zeros((BLOCK_M, PAIRS), tl.float32)
    if LANES == 2:
        s0 = tl.dot(q_rope, tl.trans(_lane(words, 0, dtype)), s0)
        s1 = tl.dot(q_rope, tl.trans(_lane(words, 1, dtype)), s1)
    else:
        s0 = tl.dot(q_rope, tl.trans(words), s0, input_precision="ieee")
    for column in range(0, COLUMNS, CHUNK):  # as one product, the queries alone would fill the registers
        part = column + tl.arange(0, CHUNK)
        q_part = tl.load(q_place + part[None, :], mask=live[:, None] & (part < DV)[None, :], other=0.0).to(tl.float32)
        seen = (q_part * scale).to(dtype)
        keys = tl.load(arena + place[:, None] + part[None, :], mask=inside[:, None] & (part < DV)[None, :], other=0)
        if LANES == 2:
            s0 = tl.dot(seen, tl.trans(_lane(keys, 0, dtype)), s0)
            s1 = tl.dot(seen, tl.trans(_lane(keys, 1, dtype)), s1)
        else:
            s0 = tl.dot(seen, tl.trans(keys), s0, input_precision="ieee")
    return s0, s1


@triton.jit
def latent_kernel(
    q, q_stride, q_head_stride, arena, layer_words, items, starts, seq_lens, table, table_stride, scale, out, out_stride, marks,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROPE: tl.constexpr, PARTIAL: tl.constexpr,
    SPLITS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Grid (items, head blocks, splits). Keys are latents [D], whose first DV channels are the values too; the rest is padded to ROPE."""
    PAIRS: tl.constexpr = BLOCK_N // LANES
    item, split = tl.program_id(0), tl.program_id(2)
    request, rows, head, position, low, high = _rows(item, items, starts, seq_lens, tl.program_id(1), BLOCK_M, HEADS, GROUP)
    if request >= 0:
        _, first, last, end = _range(low, high, split, 0, BLOCK_N, SPLITS)
        columns, rope, live = tl.arange(0, COLUMNS), DV + tl.arange(0, ROPE), position >= 0
        q_place = q + rows.to(tl.int64)[:, None] * q_stride + head[:, None] * q_head_stride
        q_rope = (tl.load(q_place + rope[None, :], mask=live[:, None] & (rope < D)[None, :], other=0.0).to(tl.float32) * scale).to(dtype)
        sums = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        largest, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        table += request.to(tl.int64) * table_stride
        for start in range(first, last, BLOCK_N):
            tokens = start + tl.arange(0, PAIRS) * LANES
            inside = tokens < end
            place = _block_start(table, tokens, inside, layer_words, BLOCK_SIZE) + (tokens % BLOCK_SIZE) // LANES * D
            s0, s1 = _latent_scores(
                q_place, q_rope, arena, place, inside, live, scale, D, DV, LANES, BLOCK_M, PAIRS, COLUMNS, CHUNK, ROPE, dtype
            )
            words = tl.load(arena + place[:, None] + columns[None, :], mask=inside[:, None] & (columns < DV)[None, :], other=0)
            s0 = tl.where(tokens[None, :] <= position[:, None], s0, -float("inf"))
            if LANES == 2:
                s1 = tl.where(tokens[None, :] + 1 <= position[:, None], s1, -float("inf"))
                new = tl.maximum(largest, tl.maximum(tl.max(s0, axis=1), tl.max(s1, axis=1)))
                base = tl.where(new == -float("inf"), 0.0, new)
                p0, p1 = tl.exp2(s0 - base[:, None]), tl.exp2(s1 - base[:, None])
                factor = tl.exp2(largest - base)
                total = total * factor + tl.sum(p0, axis=1) + tl.sum(p1, axis=1)
                value1 = tl.where((tokens + 1 < end)[:, None], _lane(words, 1, dtype), 0.0).to(dtype)
                sums = tl.dot(p0.to(dtype), _lane(words, 0, dtype), sums * factor[:, None])
                sums = tl.dot(p1.to(dtype), value1, sums)
                largest = new
            else:
                p, largest, factor, total = _fold(s0, largest, total, largest, False)
                sums = tl.dot(p, words, sums * factor[:, None], input_precision="ieee")
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
def write_kernel(
    qkv, stride, cos_sin, arena, layer_bytes, request_of, starts, seq_lens, table, table_stride, q_norm, k_norm, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, LANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Grid (T, H + 2K): normalize and rotate a head of q in place, or of k into the arena; copy a head of v there.

    arena: of the KV dtype. HALF: pairs that are rotated, in BLOCK lanes; the other channels of the head in REST lanes (a power of 2 each).
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
            tl.store(layer + place + channels * LANES, v.to(arena.dtype.element_ty), mask=channels < DV)
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
            if part < Q_HEADS:
                tl.store(head + first, a.to(qkv.dtype.element_ty), mask=turned)
                tl.store(head + second, b.to(qkv.dtype.element_ty), mask=turned)
                if NORM:
                    tl.store(head + rest, c.to(qkv.dtype.element_ty), mask=rest < D)
            else:
                k = layer + (part - Q_HEADS) * (K_ROWS * BLOCK_SIZE * LANES) + slot * LANES
                tl.store(k + first // LANES * width + first % LANES, a.to(arena.dtype.element_ty), mask=turned)
                tl.store(k + second // LANES * width + second % LANES, b.to(arena.dtype.element_ty), mask=turned)
                tl.store(k + rest // LANES * width + rest % LANES, c.to(arena.dtype.element_ty), mask=rest < D)


@triton.jit
def write_latent_kernel(
    latent, stride, arena, layer_bytes, request_of, starts, seq_lens, table, table_stride,
    D: tl.constexpr, LANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (T,): latent [T, D] into the arena, which is of the KV dtype."""
    token = tl.program_id(0)
    request, _, entry, slot = _slot(request_of, starts, seq_lens, table, table_stride, token, BLOCK_SIZE)
    if request >= 0:
        channels = tl.arange(0, BLOCK)
        values = tl.load(latent + token.to(tl.int64) * stride + channels, mask=channels < D, other=0.0)
        place = arena + (entry * 256 + layer_bytes) // (4 // LANES) + slot // LANES * (D * LANES) + slot % LANES
        tl.store(place + channels * LANES, values.to(arena.dtype.element_ty), mask=channels < D)
