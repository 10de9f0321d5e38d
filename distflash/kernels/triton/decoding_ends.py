"""Which of a rank's keys new tokens see, and whether a step can be made at all, found from what stands in memory.

[Note: shapes] as in `distflash.kernels.decoding`; a table has N positions and P parts. NP is the tokens of a tile of
rows, n at most, and PP is P, padded to the next power of two. E = PP * NP numbers the ends.
"""

import triton
import triton.language as tl

from distflash.kernels import decoding

FULL = tl.constexpr(decoding.FULL)
BEYOND = tl.constexpr(decoding.BEYOND)
# How many sequences are looked at together.
SEQUENCES = tl.constexpr(64)


@triton.jit
def global_ends(ends, position, tokens, horizon, PARTS: tl.constexpr, NP: tl.constexpr, E: tl.constexpr):
    """``lo, hi [E]`` of part ``e // NP`` at the token ``e % NP`` of ``tokens``, both 0 where there is none such.

    ``position`` of the first of these tokens, relative to the table's.
    """
    part, token = tl.arange(0, E) // NP, tl.arange(0, E) % NP
    exists = (part < PARTS) & (token < tokens)
    index = tl.minimum(tl.maximum(position + token, 0), horizon - 1)
    lo = tl.load(ends + part.to(tl.int64) * horizon + index, mask=exists, other=0)
    hi = tl.load(ends + (PARTS + part).to(tl.int64) * horizon + index, mask=exists, other=0)
    return lo, hi


@triton.jit
def samples(positions, room, LANES: tl.constexpr, LEVELS: tl.constexpr):
    """The first of each of LANES runs of positions, also of those that are not kept: nothing has to be known."""
    first = tl.arange(0, LANES) * LANES ** (LEVELS - 1)
    return tl.load(positions + first, mask=first < room, other=0)


@triton.jit
def local_ends(positions, sample, count, lo, hi, LEVELS: tl.constexpr):
    """How many of the first ``count`` positions lie below each of ``lo`` and ``hi [E]``.

    The `samples` say in which run an end lies, of which samples are read in turn. A run is LANES ** (LEVELS - 1) long
    first, and LANES in the end. Nothing is read for ends before the first position or behind the last, which are most.
    """
    LANES: tl.constexpr = sample.shape[0]
    RUN: tl.constexpr = LANES ** (LEVELS - 1)
    lanes = tl.arange(0, LANES)[None, :]
    last = tl.load(positions + tl.maximum(count - 1, 0))
    exists = lanes * RUN < count
    runs_lo, runs_hi = both_counts(exists & (sample[None, :] < lo[:, None]), exists & (sample[None, :] < hi[:, None]))
    looked_lo, looked_hi = (runs_lo > 0) & (lo <= last), (runs_hi > 0) & (hi <= last)
    found_lo, found_hi = tl.maximum(runs_lo - 1, 0) * RUN, tl.maximum(runs_hi - 1, 0) * RUN
    for level in tl.static_range(1, LEVELS):
        step = LANES ** (LEVELS - 1 - level)
        slots_lo, slots_hi = found_lo[:, None] + lanes * step, found_hi[:, None] + lanes * step
        mask_lo, mask_hi = looked_lo[:, None] & (slots_lo < count), looked_hi[:, None] & (slots_hi < count)
        at_lo = tl.load(positions + slots_lo, mask=mask_lo, other=0)
        at_hi = tl.load(positions + slots_hi, mask=mask_hi, other=0)
        below_lo, below_hi = both_counts(mask_lo & (at_lo < lo[:, None]), mask_hi & (at_hi < hi[:, None]))
        if level < LEVELS - 1:
            below_lo, below_hi = tl.maximum(below_lo - 1, 0) * step, tl.maximum(below_hi - 1, 0) * step
        found_lo, found_hi = found_lo + below_lo, found_hi + below_hi
    found_lo, found_hi = tl.where(lo > last, count, found_lo), tl.where(hi > last, count, found_hi)
    return tl.where(count > 0, found_lo, 0), tl.where(count > 0, found_hi, 0)


@triton.jit
def both_counts(a, b):
    """How many are true in each row of two tensors, by one sum."""
    found = tl.sum(a.to(tl.int32) + b.to(tl.int32) * 65536, 1)
    return found % 65536, found // 65536


@triton.jit
def hull(lo, hi, part, NP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the keys begin and stop that any token sees in this part, and how many tiles they are."""
    E: tl.constexpr = lo.shape[0]
    seen = (tl.arange(0, E) // NP == part) & (lo < hi)
    begin = tl.min(tl.where(seen, lo, 2147483647), 0)
    stop = tl.max(tl.where(seen, hi, 0), 0)
    return begin, stop, tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_N)


@triton.jit
def of_rows(x, part, token, NP: tl.constexpr):
    """``[rows]``: of ``x [E]`` that of the part and each row's token."""
    E: tl.constexpr = x.shape[0]
    chosen = tl.arange(0, E)[None, :] == (part * NP + token)[:, None]
    return tl.sum(tl.where(chosen, x[None, :], 0), 1)


@triton.jit
def trouble(
    counts, lengths, fault, start, horizon, room, batches, NEW: tl.constexpr, W: tl.constexpr, WP: tl.constexpr
):
    """See [Note: fault] in `distflash.kernels.decoding`: whether a step can be made, over all sequences."""
    known = tl.load(fault)
    full, beyond = 0, 0
    for first in range(0, batches, SEQUENCES):
        sequence = first + tl.arange(0, SEQUENCES)
        exists = sequence < batches
        ranks = tl.arange(0, WP)[None, :]
        each = tl.load(counts + sequence[:, None] * W + ranks, mask=exists[:, None] & (ranks < W), other=0)
        at = tl.load(lengths + sequence, mask=exists, other=start) - start
        full += tl.max((exists & (tl.sum(each, 1) + NEW > room * W)).to(tl.int32), 0)
        beyond += tl.max((exists & ((at < 0) | (at + NEW > horizon))).to(tl.int32), 0)
    return tl.where(known != 0, known, tl.where(full > 0, FULL, tl.where(beyond > 0, BEYOND, 0)))
