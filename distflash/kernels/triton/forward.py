"""The forward kernel: attention of blocks of queries over one source's keys, merged into the running state.

Online softmax with the loop over keys innermost, after FlashAttention-2 (https://arxiv.org/abs/2307.08691). The state
of that loop (maximum, total, weighted values) is also kept between passes, so a later pass continues the loop. A sink
is a state with a total of 1 and no value. The maximum is in base 2.

[Note: shapes] as in `common`.
"""

import triton
import triton.language as tl

from distflash.kernels.triton.common import (
    ENDS,
    LN2,
    LOG2E,
    STARTS,
    bias,
    border,
    load_rows,
    locate,
    pick,
    span,
    store_rows,
    tanh,
)
from distflash.kernels.triton.dropout import keep_share, kept, places, stream_of


@triton.jit
def attend(
    state, q, k, v, batch, kv_head, start, length, k_positions, q_pos, lo, hi, slope, scale, softcap, stream, q_places,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, IN_TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the tile of keys at ``start`` into the state ``(maximum, sum, accumulator)``."""
    m, l, acc = state
    keys = start + tl.arange(0, BLOCK_N)
    key = load_rows(k, batch, kv_head, start, length, BLOCK_N, D, DP, TMA)
    s = tl.dot(q, key.T, input_precision="ieee")
    # The bare scale waits to be part of the exponential's multiply-add.
    factor = scale * LOG2E
    if SOFTCAP:
        s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        factor = 1.0
    if ALIBI:
        k_pos = tl.load(k_positions + keys, mask=keys < length, other=0)
        s = s * factor + bias(slope, q_pos[:, None], k_pos[None, :])
        factor = 1.0
    if MASKED:
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    shift = m_new
    if MASKED:
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - shift[:, None])
    alpha = tl.exp2(m - shift)
    dropped_p = p
    if DROPOUT:
        k_places = places(k_positions, start, length, BLOCK_N, 1, IN_TILES)
        dropped_p = tl.where(kept(stream, q_places, k_places), p, stream[3])
    value = load_rows(v, batch, kv_head, start, length, BLOCK_N, V, VP, TMA)
    acc = tl.dot(dropped_p.to(value.dtype), value, acc * alpha[:, None], input_precision="ieee")
    return m_new, l * alpha + tl.sum(p, 1), acc


@triton.jit
def with_sink(m, l, acc, sink):
    """The state with one more logit, natural and without a value."""
    m_new = tl.maximum(m, sink * LOG2E)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - shift)
    return m_new, l * alpha + tl.exp2(sink * LOG2E - shift), acc * alpha[:, None]


@triton.jit
def store_state(
    state, final, lse, sums, sinks, batch, head, first, queries, at_row, exists, ends,
    V: tl.constexpr, SINKS: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """Write the result where rows end, and otherwise the running state for the next pass."""
    m, l, acc = state
    maximum, total, weighted = sums
    if ends:
        if MAXIMA:
            tl.store(maximum + at_row, m, mask=exists)
            if SINKS:
                m, l, acc = with_sink(m, l, acc, tl.load(sinks + head).to(tl.float32))
        acc = acc * tl.where(l > 0.0, 1.0 / l, 0.0)[:, None]
        tl.store(lse + at_row, (m + tl.log2(l)) * LN2, mask=exists)
        store_rows(final, batch, head, first, queries, acc, V)
    else:
        tl.store(maximum + at_row, m, mask=exists)
        tl.store(total + at_row, l, mask=exists)
        store_rows(weighted, batch, head, first, queries, acc, V)


@triton.jit(
    do_not_specialize=[
        "q", "k", "v", "final", "weighted", "dropout",
        "queries", "keys", "batches", "live", "flags", "heads_at_once",
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v,  # [B, T, H, D], [B, K, G, D], [B, K, G, V], as `load_rows` takes them
    row_lo, row_hi, q_positions, k_positions,  # int32 [T], [T], [T], [K]
    slopes, sinks,  # [H], read where ALIBI and SINKS
    dropout,  # read where DROPOUT, see `dropout`
    final, lse,  # [B, T, H, V] in q's dtype, float32 [B, H, T]: written where rows end
    maximum, total, weighted,  # float32 [B, H, T], [B, H, T], [B, T, H, V]: between passes
    # The maximum is without sinks and written where rows end, too, if MAXIMA.
    groups, live, flags,  # int32 [N, 2] and the number of rows that they are; or flags of all rows, see `locate`
    scale, softcap, queries, keys, heads, batches, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    MAXIMA: tl.constexpr, DROPOUT: tl.constexpr, IN_TILES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(live, BLOCK_M)
    block, plane = pick(tl.program_id(0), blocks, heads * batches, heads_at_once)
    batch, head = plane // heads, plane % heads
    # Under causal masks later rows see more: longest first.
    first, flags = locate((blocks - 1 - block) * BLOCK_M, groups, flags, BLOCK_M)
    starts, ends = (flags & STARTS) != 0, (flags & ENDS) != 0
    ALIGN: tl.constexpr = BLOCK_N if IN_TILES else 1
    begin, before, full, tiles = span(row_lo, row_hi, first, tl.minimum(first + BLOCK_M, queries) - 1, BLOCK_N, ALIGN)
    if (tiles == 0) & ((flags & (STARTS | ENDS)) == 0):
        return  # nothing to add, and what there is stays where it is

    rows = first + tl.arange(0, BLOCK_M)
    exists = rows < queries
    lo = tl.load(row_lo + rows, mask=exists, other=0)
    hi = tl.load(row_hi + rows, mask=exists, other=0)
    q_pos, slope = rows, 0.0
    if ALIBI:
        q_pos = tl.load(q_positions + rows, mask=exists, other=0)
        slope = tl.load(slopes + head).to(tl.float32)
    stream, q_places, keep = 0, 0, 1.0
    if DROPOUT:
        stream, keep = stream_of(dropout, batch, head), keep_share(dropout)
        q_places = places(q_positions, first, queries, BLOCK_M, 0, IN_TILES)

    at_row = plane.to(tl.int64) * queries + rows
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_M, VP], tl.float32)
    if starts:
        if SINKS and not MAXIMA:
            m = tl.full([BLOCK_M], LOG2E, tl.float32) * tl.load(sinks + head).to(tl.float32)
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    else:
        m = tl.load(maximum + at_row, mask=exists, other=float("-inf"))
        l = tl.load(total + at_row, mask=exists, other=0.0)
        acc = load_rows(weighted, batch, head, first, queries, BLOCK_M, V, VP, False) * keep  # without the keep scale

    query = load_rows(q, batch, head, first, queries, BLOCK_M, D, DP, TMA)
    for i in range(tiles - full):
        m, l, acc = attend(
            (m, l, acc), query, k, v, batch, head // GROUP, begin + border(i, before, full) * BLOCK_N, keys,
            k_positions, q_pos, lo, hi, slope, scale, softcap, stream, q_places,
            D, V, DP, VP, BLOCK_N, TMA, SOFTCAP, ALIBI, DROPOUT, IN_TILES, True,
        )  # fmt: skip
    for start in range(begin + before * BLOCK_N, begin + (before + full) * BLOCK_N, BLOCK_N):
        m, l, acc = attend(
            (m, l, acc), query, k, v, batch, head // GROUP, start, keys,
            k_positions, q_pos, lo, hi, slope, scale, softcap, stream, q_places,
            D, V, DP, VP, BLOCK_N, TMA, SOFTCAP, ALIBI, DROPOUT, IN_TILES, False,
        )  # fmt: skip

    if DROPOUT:
        acc *= tl.div_rn(1.0, keep)
    store_state(
        (m, l, acc), final, lse, (maximum, total, weighted), sinks, batch, head, first, queries, at_row, exists, ends,
        V, SINKS, MAXIMA,
    )  # fmt: skip
