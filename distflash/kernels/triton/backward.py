"""The backward kernels: one for dK and dV, one for dQ, and the preprocess that both need.

Each of the two accumulates its output in registers, after FlashAttention-2 (https://arxiv.org/abs/2307.08691). Two of
the seven products are computed twice, but nothing is added through memory, so results have the same bits in every run.
With P the softmax and dP = dO V^T: dV = P^T dO, dS = P * (dP - delta), dQ = dS K, dK = dS^T Q.

[Note: shapes] as in `common`. ``stats`` is float32 ``[2, B * H, T]``: the log-sum-exp in base 2, and delta; +inf and 0
for queries with no visible key, so that their P and dS are 0.
"""

import triton
import triton.language as tl

from distflash.kernels.triton.common import LOG2E, bias, border, load_column, load_rows, pick, span, store_rows, tanh
from distflash.kernels.triton.dropout import keep_share, kept, places, stream_of


@triton.jit
def softmax_and_slope(
    s, lse2, visible, q_pos, k_pos, slope, scale, softcap,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """From raw products ``q.k`` the softmax, and the derivative of the score by the scaled product (1 but for softcap).

    All other operands broadcast against ``s``, which may be ``[M, N]`` or its transpose.
    """
    slope_of_cap = 1.0
    if SOFTCAP:
        t = tanh(s * (scale / softcap))
        slope_of_cap = 1.0 - t * t
        s = t * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    if ALIBI:
        s += bias(slope, q_pos, k_pos)
    p = tl.exp2(s - lse2)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    return p, slope_of_cap


@triton.jit
def score_gradient(p, dp, delta, slope_of_cap, SOFTCAP: tl.constexpr):
    """dS, as the gradient of the scaled product: what remains to be multiplied by is the scale.

    Under dropout also the keep scale: there dP is 0 where it is dropped, and delta is multiplied by the share kept.
    """
    ds = p * (dp - delta)
    if SOFTCAP:
        ds *= slope_of_cap
    return ds


@triton.jit
def attend_keys(
    dk, dv, key, value, q, dout, stats, batch, head, heads, planes, start, length, q_positions, k_pos, lo, hi,
    slopes, scale, softcap, dropout, k_places,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BLOCK_M: tl.constexpr, TMA: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, IN_TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tile of queries at ``start`` to dK and dV.

    Everything is transposed, ``[N, M]``: P^T and dS^T are then the left operands of the next products, which tensor
    cores take from registers.
    """
    rows = start + tl.arange(0, BLOCK_M)
    plane = batch * heads + head
    slope, q_pos = 0.0, rows
    if ALIBI:
        slope = tl.load(slopes + head).to(tl.float32)
        q_pos = tl.load(q_positions + rows, mask=rows < length, other=0)
    visible = (rows[None, :] >= lo[:, None]) & (rows[None, :] < hi[:, None])

    query = load_rows(q, batch, head, start, length, BLOCK_M, D, DP, TMA)
    s = tl.dot(key, query.T, input_precision="ieee")
    log_sum = load_column(stats, 0, planes, plane, start, length, BLOCK_M, TMA)
    p, slope_of_cap = softmax_and_slope(
        s, log_sum[None, :], visible, q_pos[None, :], k_pos[:, None], slope, scale, softcap, SOFTCAP, ALIBI, MASKED
    )
    gradient = load_rows(dout, batch, head, start, length, BLOCK_M, V, VP, TMA)
    dp = tl.dot(value, gradient.T, input_precision="ieee")
    row_sum = load_column(stats, 1, planes, plane, start, length, BLOCK_M, TMA)
    dropped_p = p
    if DROPOUT:
        q_places = places(q_positions, start, length, BLOCK_M, 1, IN_TILES)
        stream = stream_of(dropout, batch, head)
        keeps = kept(stream, q_places, k_places)
        dropped_p, dp = tl.where(keeps, p, stream[3]), tl.where(keeps, dp, 0.0)
        row_sum *= keep_share(dropout)
    ds = score_gradient(p, dp, row_sum[None, :], slope_of_cap, SOFTCAP)
    # Both left operands are ready before either product starts: the hardware takes them from registers, which must not
    # change while products are in flight, and the assembler would wait after every single one.
    p, ds = dropped_p.to(gradient.dtype), ds.to(query.dtype)
    dv = tl.dot(p, gradient, dv, input_precision="ieee")
    dk = tl.dot(ds, query, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def seat(i, tiles, GROUP: tl.constexpr):
    """Step ``i`` of a loop over all tiles of all heads of a group, as (head of the group, tile)."""
    if GROUP == 1:
        return 0, i
    else:
        # The loads of a loop's first steps begin above the loop, under the condition that it has these steps; and there
        # the compiler divides without that condition. From a division by 0 it would conclude that there are tiles, and
        # load them in any case: no wait would cover these loads, which would overwrite the epilogue's shared memory.
        tiles = tl.maximum(tiles, 1)
        return i // tiles, i % tiles


@triton.jit(do_not_specialize=["dropout", "queries", "keys", "batches", "heads_at_once"])
def dkdv_kernel(
    q, k, v, dout,  # [B, T, H, D], [B, K, G, D], [B, K, G, V], [B, T, H, V], as `load_rows` takes them
    stats,  # float32 [2, B * H, T], as `load_column` takes it
    col_lo, col_hi, q_positions, k_positions,  # int32 [K], [K], [T], [K]
    slopes,  # [H], read where ALIBI
    dropout,  # read where DROPOUT, see `dropout`
    dk, dv,  # [B, K, G, D], [B, K, G, V]
    scale, softcap, queries, keys, heads, batches, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, IN_TILES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_N)
    block, plane = pick(tl.program_id(0), blocks, heads // GROUP * batches, heads_at_once)
    batch, kv_head = plane // (heads // GROUP), plane % (heads // GROUP)
    first = block * BLOCK_N  # under causal masks earlier keys are seen by more: longest first
    ALIGN: tl.constexpr = BLOCK_M if IN_TILES else 4
    begin, before, full, tiles = span(col_lo, col_hi, first, tl.minimum(first + BLOCK_N, keys) - 1, BLOCK_M, ALIGN)

    columns = first + tl.arange(0, BLOCK_N)
    exists = columns < keys
    lo = tl.load(col_lo + columns, mask=exists, other=0)
    hi = tl.load(col_hi + columns, mask=exists, other=0)
    k_pos = columns
    if ALIBI:
        k_pos = tl.load(k_positions + columns, mask=exists, other=0)
    k_places = 0
    if DROPOUT:
        k_places = places(k_positions, first, keys, BLOCK_N, 0, IN_TILES)

    key = load_rows(k, batch, kv_head, first, keys, BLOCK_N, D, DP, TMA)
    value = load_rows(v, batch, kv_head, first, keys, BLOCK_N, V, VP, TMA)
    sum_k = tl.zeros([BLOCK_N, DP], tl.float32)
    sum_v = tl.zeros([BLOCK_N, VP], tl.float32)
    # All query heads of the group in one loop, so that loads run ahead over the seams between heads.
    masked = tiles - full
    for i in range(GROUP * masked):
        member, tile = seat(i, masked, GROUP)
        sum_k, sum_v = attend_keys(
            sum_k, sum_v, key, value, q, dout, stats, batch, kv_head * GROUP + member, heads, heads * batches,
            begin + border(tile, before, full) * BLOCK_M, queries, q_positions, k_pos, lo, hi,
            slopes, scale, softcap, dropout, k_places,
            D, V, DP, VP, BLOCK_M, TMA, SOFTCAP, ALIBI, DROPOUT, IN_TILES, True,
        )  # fmt: skip
    for i in range(GROUP * full):
        member, tile = seat(i, full, GROUP)
        sum_k, sum_v = attend_keys(
            sum_k, sum_v, key, value, q, dout, stats, batch, kv_head * GROUP + member, heads, heads * batches,
            begin + (before + tile) * BLOCK_M, queries, q_positions, k_pos, lo, hi,
            slopes, scale, softcap, dropout, k_places,
            D, V, DP, VP, BLOCK_M, TMA, SOFTCAP, ALIBI, DROPOUT, IN_TILES, False,
        )  # fmt: skip
    if DROPOUT:
        keep_scale = tl.div_rn(1.0, keep_share(dropout))
        sum_v, sum_k = sum_v * keep_scale, sum_k * keep_scale
    store_rows(dv, batch, kv_head, first, keys, sum_v, V)
    store_rows(dk, batch, kv_head, first, keys, sum_k * scale, D)


@triton.jit
def attend_queries(
    dq, query, gradient, k, v, batch, kv_head, start, length, log_sum, row_sum, k_positions, q_pos, lo, hi,
    slope, scale, softcap, stream, q_places,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, IN_TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tile of keys at ``start`` to dQ."""
    columns = start + tl.arange(0, BLOCK_N)
    k_pos = columns
    if ALIBI:
        k_pos = tl.load(k_positions + columns, mask=columns < length, other=0)
    visible = (columns[None, :] >= lo[:, None]) & (columns[None, :] < hi[:, None])

    key = load_rows(k, batch, kv_head, start, length, BLOCK_N, D, DP, TMA)
    s = tl.dot(query, key.T, input_precision="ieee")
    value = load_rows(v, batch, kv_head, start, length, BLOCK_N, V, VP, TMA)
    dp = tl.dot(gradient, value.T, input_precision="ieee")
    p, slope_of_cap = softmax_and_slope(
        s, log_sum[:, None], visible, q_pos[:, None], k_pos[None, :], slope, scale, softcap, SOFTCAP, ALIBI, MASKED
    )
    if DROPOUT:
        k_places = places(k_positions, start, length, BLOCK_N, 1, IN_TILES)
        dp = tl.where(kept(stream, q_places, k_places), dp, 0.0)
    ds = score_gradient(p, dp, row_sum[:, None], slope_of_cap, SOFTCAP)
    return tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        "q", "k", "v", "dout", "stats", "sum", "final", "dropout",
        "queries", "keys", "batches", "first_hop", "last_hop", "heads_at_once",
    ]
)  # fmt: skip
def dq_kernel(
    q, k, v, dout,  # [B, T, H, D], [B, K, G, D], [B, K, G, V], [B, T, H, V], as `load_rows` takes them
    stats,  # float32 [2, B * H, T], as `load_column` takes it
    row_lo, row_hi, q_positions, k_positions,  # int32 [T], [T], [T], [K]
    slopes,  # [H], read where ALIBI
    dropout,  # read where DROPOUT, see `dropout`
    sum, final,  # [B, T, H, D], float32 and in q's dtype
    scale, softcap, queries, keys, heads, batches, first_hop, last_hop, heads_at_once,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, IN_TILES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_M)
    block, plane = pick(tl.program_id(0), blocks, heads * batches, heads_at_once)
    batch, head = plane // heads, plane % heads
    first = (blocks - 1 - block) * BLOCK_M  # longest first, as in the forward kernel
    ALIGN: tl.constexpr = BLOCK_N if IN_TILES else 1
    begin, before, full, tiles = span(row_lo, row_hi, first, tl.minimum(first + BLOCK_M, queries) - 1, BLOCK_N, ALIGN)
    if (tiles == 0) & (first_hop + last_hop == 0):
        return  # nothing to add, and what there is stays where it is

    rows = first + tl.arange(0, BLOCK_M)
    exists = rows < queries
    lo = tl.load(row_lo + rows, mask=exists, other=0)
    hi = tl.load(row_hi + rows, mask=exists, other=0)
    q_pos, slope = rows, 0.0
    if ALIBI:
        q_pos = tl.load(q_positions + rows, mask=exists, other=0)
        slope = tl.load(slopes + head).to(tl.float32)
    log_sum = load_column(stats, 0, heads * batches, plane, first, queries, BLOCK_M, False)
    row_sum = load_column(stats, 1, heads * batches, plane, first, queries, BLOCK_M, False)
    stream, q_places = 0, 0
    if DROPOUT:
        stream = stream_of(dropout, batch, head)
        q_places = places(q_positions, first, queries, BLOCK_M, 0, IN_TILES)
        row_sum *= keep_share(dropout)

    query = load_rows(q, batch, head, first, queries, BLOCK_M, D, DP, TMA)
    gradient = load_rows(dout, batch, head, first, queries, BLOCK_M, V, VP, TMA)
    dq = tl.zeros([BLOCK_M, DP], tl.float32)
    for i in range(tiles - full):
        dq = attend_queries(
            dq, query, gradient, k, v, batch, head // GROUP, begin + border(i, before, full) * BLOCK_N, keys,
            log_sum, row_sum, k_positions, q_pos, lo, hi, slope, scale, softcap, stream, q_places,
            D, V, DP, VP, BLOCK_N, TMA, SOFTCAP, ALIBI, DROPOUT, IN_TILES, True,
        )  # fmt: skip
    for start in range(begin + before * BLOCK_N, begin + (before + full) * BLOCK_N, BLOCK_N):
        dq = attend_queries(
            dq, query, gradient, k, v, batch, head // GROUP, start, keys,
            log_sum, row_sum, k_positions, q_pos, lo, hi, slope, scale, softcap, stream, q_places,
            D, V, DP, VP, BLOCK_N, TMA, SOFTCAP, ALIBI, DROPOUT, IN_TILES, False,
        )  # fmt: skip
    dq *= scale
    if DROPOUT:
        dq *= tl.div_rn(1.0, keep_share(dropout))
    if first_hop == 0:
        dq += load_rows(sum, batch, head, first, queries, BLOCK_M, D, DP, False)
    if last_hop != 0:
        store_rows(final, batch, head, first, queries, dq, D)
    else:
        store_rows(sum, batch, head, first, queries, dq, D)


@triton.jit(do_not_specialize=["out", "dout", "queries", "padded", "planes", "dlse_batch", "dlse_head", "dlse_row"])
def statistics_kernel(
    out, dout,  # [B, T, H, V], as `at_rows` takes them
    lse,  # float32 [B, H, T]
    dlse, dlse_batch, dlse_head, dlse_row,  # [B, H, T] and its strides, read where DLSE
    stats,  # float32 [2, B, H, padded]
    queries, padded, heads, planes,
    V: tl.constexpr, VP: tl.constexpr, BLOCK_M: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """What the other two read of each query: lse in base 2, and delta, ``rowsum(dout * out) - dlse``.

    A query that saw no key gets +inf and 0: its softmax, and all that follows from it, comes out as 0.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    plane = tl.program_id(0) // blocks
    batch, head = plane // heads, plane % heads
    rows = first + tl.arange(0, BLOCK_M)
    exists = rows < queries
    a = load_rows(out, batch, head, first, queries, BLOCK_M, V, VP, False).to(tl.float32)
    b = load_rows(dout, batch, head, first, queries, BLOCK_M, V, VP, False).to(tl.float32)
    delta = tl.sum(a * b, 1)
    if DLSE:
        at = batch.to(tl.int64) * dlse_batch + head.to(tl.int64) * dlse_head + rows.to(tl.int64) * dlse_row
        delta -= tl.load(dlse + at, mask=exists, other=0.0).to(tl.float32)
    log_sum = tl.load(lse + plane.to(tl.int64) * queries + rows, mask=exists, other=0.0)
    seen = log_sum > float("-inf")
    target = stats + plane.to(tl.int64) * padded + rows
    tl.store(target, tl.where(seen, log_sum * LOG2E, float("inf")), mask=exists)
    tl.store(target + planes.to(tl.int64) * padded, tl.where(seen, delta, 0.0), mask=exists)
