"""Device functions that the forward and backward kernels share: intervals, tiles and scores.

[Note: shapes] B batch, T local queries, K local keys of the source, H query heads, G key/value heads, D head dim of q
and k, V head dim of v. A tile is BLOCK_M queries by BLOCK_N keys. DP and VP are D and V padded to the next power of
two.

Scores are in base 2: log2(e) is folded into the scale, so the softmax is one multiply-add and one exp2 per score.
"""

import triton
import triton.language as tl

from distflash import liveness

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GROUP_ROWS = tl.constexpr(liveness.GROUP_ROWS)
STARTS = tl.constexpr(liveness.STARTS)
ENDS = tl.constexpr(liveness.ENDS)


@triton.jit
def pick(program, blocks, heads, heads_at_once):
    """Which ``(block, head)`` a program works on.

    Heads are in groups, so that the tensors that their blocks share fit into the L2 cache. Within a group the block is
    the slow index: if the caller orders blocks by length, the longest blocks of all heads start first.
    """
    group = program // (heads_at_once * blocks)
    rest = program % (heads_at_once * blocks)
    width = tl.minimum(heads - group * heads_at_once, heads_at_once)
    return rest // width, group * heads_at_once + rest % width


@triton.jit
def locate(row, groups, flags, BLOCK: tl.constexpr):
    """The first row of a block, and its flags. ``row`` counts only the rows that the pass works on.

    ``groups`` as in `LiveRows`; it is read if ``flags`` is below 0. Otherwise ``flags`` are those of all rows.
    """
    group = row // GROUP_ROWS
    live = flags < 0
    start = tl.load(groups + 2 * group, mask=live, other=group * GROUP_ROWS)
    flags = tl.load(groups + 2 * group + 1, mask=live, other=flags)
    # A multiple of BLOCK, but the compiler sees it only here.
    return (start + row % GROUP_ROWS) // BLOCK * BLOCK, flags


@triton.jit
def span(lo, hi, first, last, STEP: tl.constexpr, ALIGN: tl.constexpr):
    """The tiles of ``STEP`` that a block must visit, from the ends of its first and its last interval.

    Returns:
        ``(begin, before, full, tiles)``: tile ``i`` of ``range(tiles)`` starts at ``begin + i * STEP``. Those of
        ``range(before, before + full)`` lie inside every interval of the block and need no mask. ``begin`` is rounded
        down to a multiple of ALIGN.
    """
    begin = tl.load(lo + first) // ALIGN * ALIGN
    tiles = tl.cdiv(tl.load(hi + last) - begin, STEP)
    before = tl.minimum(tl.cdiv(tl.load(lo + last) - begin, STEP), tiles)
    full = tl.maximum((tl.load(hi + first) - begin) // STEP - before, 0)
    return begin, before, full, tiles


@triton.jit
def border(i, before, full):
    """Which tile is the ``i``-th that needs a mask: first those before the full ones, then those after."""
    return tl.where(i < before, i, i + full)


@triton.jit
def at_rows(x, batch, head, row, length, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Pointers ``[ROWS, PADDED]`` into one head of ``[B, length, heads, dim]``.

    ``x`` is ``(pointer, head stride, row stride)``; a batch is ``length`` rows. So no stride depends on lengths, for
    whose divisibility launches would be compiled anew.
    """
    # The host has seen to it that rows start at multiples of 16 bytes. Only the tile's origin needs 64 bits.
    aligned: tl.constexpr = 128 // x[0].dtype.element_ty.primitive_bitwidth
    stride = tl.multiple_of(x[2], aligned)
    origin = (batch.to(tl.int64) * length + row) * stride + head.to(tl.int64) * tl.multiple_of(x[1], aligned)
    return x[0] + origin + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, PADDED)[None, :])


@triton.jit
def inside(row, length, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Mask ``[ROWS, PADDED]`` of what exists: rows below ``length``, dims below ``DIM``."""
    return (row + tl.arange(0, ROWS) < length)[:, None] & (tl.arange(0, PADDED) < DIM)[None, :]


@triton.jit
def load_rows(
    x, batch, head, row, length, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr
):
    """``[ROWS, PADDED]``: rows ``row`` onwards of one head, zeros beyond ``length`` rows and ``DIM`` dims.

    ``x`` is a descriptor of ``[B, heads, length, DIM]`` where the hardware copies whole tiles by itself, else as in
    `at_rows`. A reshape that drops leading ones becomes part of the descriptor's load; others go through registers.
    """
    if TMA:
        return x.load([batch, head, row, 0]).reshape(ROWS, PADDED)
    else:
        mask = inside(row, length, ROWS, DIM, PADDED)
        return tl.load(at_rows(x, batch, head, row, length, ROWS, PADDED), mask=mask, other=0.0)


@triton.jit
def load_column(x, which, planes, plane, row, length, ROWS: tl.constexpr, TMA: tl.constexpr):
    """``[ROWS]`` numbers from ``row`` onwards of one plane of ``[2, planes, length]``, zeros beyond ``length``.

    Planes start at multiples of 16 bytes. ``x`` is a descriptor, for which ``row`` must be a multiple of 4, or a
    pointer. In loops the descriptor matters: a plain load is copied ahead by every thread that needs the number.
    """
    if TMA:
        return x.load([which, plane, row]).reshape(ROWS)
    else:
        rows = row + tl.arange(0, ROWS)
        origin = (which * planes + plane).to(tl.int64) * (tl.cdiv(length, 4) * 4)
        return tl.load(x + origin + rows, mask=rows < length, other=0.0)


@triton.jit
def store_rows(x, batch, head, row, length, tile, DIM: tl.constexpr):
    """The reverse, rounding to ``x``'s dtype; ``x`` as in `at_rows`."""
    ROWS: tl.constexpr = tile.shape[0]
    PADDED: tl.constexpr = tile.shape[1]
    mask = inside(row, length, ROWS, DIM, PADDED)
    tl.store(at_rows(x, batch, head, row, length, ROWS, PADDED), tile.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def tanh(x):
    # Written with exp2 alone: the same on every backend, and it saturates without NaN at both ends.
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def bias(slope, q_pos, k_pos):
    """ALiBi in base 2: ``-slope * |i - j|``; the positions must broadcast against each other."""
    return (-slope * LOG2E) * tl.abs(q_pos - k_pos).to(tl.float32)
