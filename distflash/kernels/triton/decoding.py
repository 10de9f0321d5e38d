"""The decoding kernels: a few new queries over the keys that a rank keeps, split over keys, and the merge over ranks.

Flash-decoding (https://pytorch.org/blog/flash-decoding/). The query heads of a key head and the new tokens are the rows
of one tile. A unit is such a tile of one sequence; SPLITS programs share its visible keys, and the last of them to
arrive merges what they found, in the order of the splits. Where that is the result, the last unit to arrive lets the
lengths grow: everything that a step reads of the cache has been read then.

New keys are taken from the inputs, by the first split, which also stores them. So nothing that a launch writes to the
cache is read by it, and one launch is enough.

Products of P and V are those of float32, though both are short: a tile has each row twice, and takes P rounded in one
half of it and what rounding has left in the other. Tensor cores multiply 16 rows at least, and there are rarely more
than 8. So the result is rounded once.

[Note: shapes] as in `distflash.kernels.decoding` and `decoding_ends`; WP is W padded to the next power of two. A unit's
rows are ``token * GROUP + head``.
"""

import triton
import triton.language as tl

from distflash.kernels import decoding
from distflash.kernels.triton.common import LN2, LOG2E, at_rows, bias, inside, tanh
from distflash.kernels.triton.decoding_ends import SEQUENCES, global_ends, hull, local_ends, of_rows, samples, trouble

DIFFER = tl.constexpr(decoding.DIFFER)
WORDS = tl.constexpr(decoding.WORDS)
# How many numbers of a query are looked at together.
NUMBERS = tl.constexpr(4096)


# ----------------------------------------------------------------------------------------------------------- softmax


@triton.jit
def take(
    state, query, key, value, seen, slope, q_pos, k_pos, scale, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr
):
    """Take a tile of keys into the state ``(maximum, total, weighted)``, whose maximum is in base 2.

    For short dtypes the second half of the rows is the first once more.
    """
    m, l, acc = state
    s = tl.dot(query, key.T, input_precision="ieee")
    s = tanh(s * (scale / softcap)) * (softcap * LOG2E) if SOFTCAP else s * (scale * LOG2E)
    if ALIBI:
        s += bias(slope[:, None], q_pos[:, None], k_pos[None, :])
    s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    rounded = p.to(value.dtype)
    if value.dtype.primitive_bitwidth == 16:
        second = tl.arange(0, query.shape[0]) >= query.shape[0] // 2
        rounded = tl.where(second[:, None], p - rounded.to(tl.float32), p).to(value.dtype)
    acc = tl.dot(rounded, value, acc * alpha[:, None], input_precision="ieee")
    return m_new, l * alpha + tl.sum(p, 1), acc


@triton.jit
def together(state, BLOCK_M: tl.constexpr, HALVES: tl.constexpr):
    """The state of each row, of a tile that has it HALVES times."""
    m, l, acc = state
    VP: tl.constexpr = acc.shape[1]
    if HALVES == 2:
        m, l = tl.max(m.reshape(2, BLOCK_M), 0), tl.max(l.reshape(2, BLOCK_M), 0)
        acc = tl.sum(acc.reshape(2, BLOCK_M, VP), 0)
    return m, l, acc


@triton.jit
def new_rows(x, batch, token, head, mine, DIM: tl.constexpr, PADDED: tl.constexpr):
    """``[tokens, PADDED]`` of one head of ``[B, n, heads, DIM]``, which is ``(pointer, strides...)``."""
    dims = tl.arange(0, PADDED)
    start = batch.to(tl.int64) * x[1]
    at = x[0] + start + (token * x[2] + head * x[3])[:, None] + dims[None, :]
    return tl.load(at, mask=mine[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def leave(
    result,
    batch,
    first,
    rows,
    exists,
    m,
    l,
    acc,
    code,
    sinks,
    V: tl.constexpr,
    FINAL: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Write the state of rows ``[B * n * H]`` of a sequence, in natural units, or what it comes to.

    ``result`` is ``(message, length of a message)`` or ``(out, lse)``; ``first`` the number of a sequence's rows.
    """
    dims = tl.arange(0, acc.shape[1])[None, :]
    mask = exists[:, None] & (dims < V)
    if FINAL:
        if SINKS:
            sink = sinks * LOG2E
            most = tl.maximum(m, sink)
            shift = tl.where(most == float("-inf"), 0.0, most)
            mine = tl.exp2(m - shift)
            l = l * mine + tl.exp2(sink - shift)
            acc = acc * mine[:, None]
            m = most
        out = acc * tl.where(l > 0.0, 1.0 / l, 0.0)[:, None]
        lse = tl.where(l > 0.0, (m + tl.log2(l)) * LN2, float("-inf"))
        at = batch.to(tl.int64) * first + rows
        out = tl.where(code == 0, out, float("nan"))
        tl.store(result[0] + at[:, None] * V + dims, out.to(result[0].dtype.element_ty), mask=mask)
        tl.store(result[1] + at, tl.where(code == 0, lse, float("nan")), mask=exists)
    else:
        at = result[0] + batch.to(tl.int64) * (first * (V + 2) + WORDS)
        tl.store(at + rows[:, None] * V + dims, acc, mask=mask)
        tl.store(at + first * V + rows, m * LN2, mask=exists)
        tl.store(at + first * (V + 1) + rows, l, mask=exists)


# ------------------------------------------------------------------------------------------------------------ words


@triton.jit
def digest(x, batch, HEADS: tl.constexpr, NEW: tl.constexpr, DIM: tl.constexpr):
    """int32: of the bits of a sequence's ``[n, H, D]``; any one changed number changes it."""
    found = tl.zeros([NUMBERS], tl.int32)
    for first in range(0, NEW * HEADS * DIM, NUMBERS):
        n = first + tl.arange(0, NUMBERS)
        row = n // DIM
        at = batch.to(tl.int64) * x[1] + (row // HEADS) * x[2] + (row % HEADS) * x[3] + n % DIM
        number = tl.load(x[0] + at, mask=n < NEW * HEADS * DIM, other=0.0)
        if x[0].dtype.element_ty.primitive_bitwidth == 16:
            bits = number.to(tl.int16, bitcast=True).to(tl.int32)
        else:
            bits = number.to(tl.int32, bitcast=True)
        found += bits * (2 * n + 1)
    return folded(tl.sum(found.to(tl.int64), 0))


@triton.jit
def folded(x):
    """int64 to int32, so that all bits matter."""
    return (x ^ (x >> 32)).to(tl.int32)


@triton.jit
def write_words(
    words, q, counts, lengths, batch, W: tl.constexpr, WP: tl.constexpr,
    HEADS: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, V: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The end of a message, see [Note: message] in `distflash.kernels.decoding`."""
    if FINAL:
        return
    at = words + batch.to(tl.int64) * (NEW * HEADS * (V + 2) + WORDS) + NEW * HEADS * (V + 2)
    ranks = tl.arange(0, WP)
    each = tl.load(counts + batch * W + ranks, mask=ranks < W, other=0)
    tl.store(at, tl.load(lengths + batch))
    tl.store(at + 1, folded(tl.sum(each.to(tl.int64) * (ranks * 65599 + 1), 0)))
    tl.store(at + 2, digest(q, batch, HEADS, NEW, D))
    tl.store(at + 3, 0)


# ---------------------------------------------------------------------------------------------------------- attend


@triton.jit
def store_new(tile, x, batch, slots, head, room, mine, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Write rows of a tile to slots of one head of the cache."""
    dims = tl.arange(0, PADDED)
    at = x[0] + (batch.to(tl.int64) * room + slots)[:, None] * x[2] + head * x[1] + dims[None, :]
    tl.store(at, tile, mask=mine[:, None] & (dims < DIM)[None, :])


@triton.jit
def first_split(
    state, query, q_pos, slope, token, lo, hi, k, v, kept, cache, batch, head, sole, scale, softcap,
    NEW: tl.constexpr, PARTS: tl.constexpr, NP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """The new keys that are this rank's: into the state, and into the cache unless there is a fault.

    ``sole`` says whether this program is the one to write what all heads share. Returns the state and the fault.
    """
    positions, counts, lengths, fault, start, horizon, room, batches, rank = cache
    length = tl.load(lengths + batch)
    count = tl.load(counts + batch * W + rank)
    # My i-th new key comes when no rank has fewer than count + i: as many have come before it as the others lack.
    ranks, i = tl.arange(0, WP)[None, :], tl.arange(0, KEYS)[:, None]
    each = tl.load(counts + batch * W + ranks, mask=ranks < W, other=0)
    lacking = tl.where(ranks < W, tl.maximum(count + i - each + (ranks < rank).to(tl.int32), 0), 0)
    new = tl.sum(lacking, 1)
    mine = (new < NEW) & (tl.arange(0, KEYS) < NEW)
    new = tl.where(mine, new, 0)
    key = new_rows(k, batch, new, head, mine, D, DP)
    value = new_rows(v, batch, new, head, mine, V, VP)
    # While these are on their way.
    code = trouble(counts, lengths, fault, start, horizon, room, batches, NEW, W, WP)
    k_pos = length + new
    seen = tl.zeros([query.shape[0], KEYS], tl.int1)
    for part in range(PARTS):
        row_lo, row_hi = of_rows(lo, part, token, NP), of_rows(hi, part, token, NP)
        seen |= (k_pos[None, :] >= row_lo[:, None]) & (k_pos[None, :] < row_hi[:, None])
    state = take(
        state, query, key, value, seen & mine[None, :], slope, q_pos, k_pos, scale, softcap, SOFTCAP, ALIBI
    )  # fmt: skip
    slots = count + tl.arange(0, KEYS)
    kept_now = mine & (slots < room) & (code == 0)
    store_new(key, kept[0], batch, slots, head, room, kept_now, D, DP)
    store_new(value, kept[1], batch, slots, head, room, kept_now, V, VP)
    tl.store(positions + batch.to(tl.int64) * room + slots, k_pos, mask=kept_now & sole)
    tl.store(fault, code, mask=sole & (batch == 0))
    return state, code


@triton.jit
def visit(
    state, query, q_pos, slope, token, lo, hi, k, v, positions, split, batch, head, room, scale, softcap,
    PARTS: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Take a split's share of the tiles that any token sees into the state, one part of the mask after the other."""
    m, l, acc = state
    # The new keys take the first split as long as some tiles.
    total = AHEAD
    for part in range(PARTS):
        begin, stop, tiles = hull(lo, hi, part, NP, BLOCK_N)
        total += tiles
    since, until = split * total // SPLITS - AHEAD, (split + 1) * total // SPLITS - AHEAD
    for part in range(PARTS):
        begin, stop, tiles = hull(lo, hi, part, NP, BLOCK_N)
        row_lo, row_hi = of_rows(lo, part, token, NP), of_rows(hi, part, token, NP)
        for tile in range(tl.maximum(since, 0), tl.minimum(until, tiles)):
            start = begin + tile * BLOCK_N
            keys = start + tl.arange(0, BLOCK_N)
            key_at = at_rows(k, batch, head, start, room, BLOCK_N, DP)
            value_at = at_rows(v, batch, head, start, room, BLOCK_N, VP)
            # What lies behind the last key may be anything: 0 times a NaN would be one.
            key = tl.load(key_at, mask=inside(start, stop, BLOCK_N, D, DP), other=0.0)
            value = tl.load(value_at, mask=inside(start, stop, BLOCK_N, V, VP), other=0.0)
            k_pos = keys
            if ALIBI:
                k_pos = tl.load(positions + keys, mask=keys < stop, other=0)
            seen = (keys[None, :] >= row_lo[:, None]) & (keys[None, :] < row_hi[:, None])
            m, l, acc = take((m, l, acc), query, key, value, seen, slope, q_pos, k_pos, scale, softcap, SOFTCAP, ALIBI)
        since -= tiles
        until -= tiles
    return m, l, acc


@triton.jit
def store_partial(scratch, unit, split, state, first, rows, SPLITS: tl.constexpr, V: tl.constexpr):
    """What a split has found, for the one that merges; the unit's rows begin at ``first``, and there are ``rows``."""
    m, l, acc = state
    weighted, sums, step, _ = scratch
    BLOCK_M: tl.constexpr = m.shape[0]
    exists = first + tl.arange(0, BLOCK_M) < rows
    at = (unit.to(tl.int64) * SPLITS + split) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, acc.shape[1])[None, :]
    tl.store(sums + at, m, mask=exists)
    tl.store(sums + step + at, l, mask=exists)
    tl.store(weighted + at[:, None] * V + dims, acc, mask=exists[:, None] & (dims < V))


@triton.jit
def leave_unit(
    scratch, unit, units, result, batch, batches, head, first, sinks, counter, counts, lengths,
    G: tl.constexpr, GROUP: tl.constexpr, NEW: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, BLOCK_M: tl.constexpr, MERGE_M: tl.constexpr,
    FINAL: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a unit, MERGE_M rows and SP splits at a time, and write them; then lengths may grow.

    ``first``: of the key head's rows.
    """
    weighted, sums, step, codes = scratch
    # What other programs wrote is in the L2 cache, not in this processor's.
    code = tl.load(codes + unit, cache_modifier=".cg").to(tl.int32)
    for start in range(0, tl.minimum(BLOCK_M, NEW * GROUP - first), MERGE_M):
        row = start + tl.arange(0, MERGE_M)
        exists = first + row < NEW * GROUP
        m, l = tl.full([MERGE_M], float("-inf"), tl.float32), tl.zeros([MERGE_M], tl.float32)
        acc = tl.zeros([MERGE_M, VP], tl.float32)
        for some in range(0, SPLITS, SP):
            split = some + tl.arange(0, SP)[:, None]
            at = (unit.to(tl.int64) * SPLITS + split) * BLOCK_M + row[None, :]
            mask = (split < SPLITS) & exists[None, :]
            dims = tl.arange(0, VP)[None, None, :]
            most = tl.load(sums + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
            total = tl.load(sums + step + at, mask=mask, other=0.0, cache_modifier=".cg")
            at, mask = at[:, :, None] * V + dims, mask[:, :, None] & (dims < V)
            summed = tl.load(weighted + at, mask=mask, other=0.0, cache_modifier=".cg")
            if (start == 0) & (some == 0):  # while these are on their way
                grow(counter, units, code, counts, lengths, batches, NEW, FINAL)
            m_new = tl.maximum(m, tl.max(most, 0))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            before, share = tl.exp2(m - shift), tl.exp2(most - shift[None, :])
            l = l * before + tl.sum(share * total, 0)
            acc = acc * before[:, None] + tl.sum(summed * share[:, :, None], 0)
            m = m_new
        leave_rows((m, l, acc), row, result, batch, head, first, code, sinks, G, GROUP, NEW, V, FINAL, SINKS)


@triton.jit
def leave_rows(
    state, row, result, batch, head, first, code, sinks,
    G: tl.constexpr, GROUP: tl.constexpr, NEW: tl.constexpr, V: tl.constexpr,
    FINAL: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """`leave` for some rows of a unit. ``first``: of the key head's rows."""
    m, l, acc = state
    row += first
    exists, head_of_row = row < NEW * GROUP, head * GROUP + row % GROUP
    sink = sinks_of(sinks, head_of_row, exists, SINKS)
    at = row // GROUP * (G * GROUP) + head_of_row
    leave(result, batch, NEW * G * GROUP, at, exists, m, l, acc, code, sink, V, FINAL, SINKS)


@triton.jit
def sinks_of(sinks, head, exists, SINKS: tl.constexpr):
    if SINKS:
        return tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def last_of(counter, programs, ORDER: tl.constexpr):
    """Whether all others have called this. The counter is 0 afterwards."""
    last = tl.atomic_add(counter, 1, sem=ORDER) == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def grow(counter, units, code, counts, lengths, batches, NEW: tl.constexpr, FINAL: tl.constexpr):
    """All new keys are kept by the only rank. Called by each unit once it has read all that it needs to know."""
    if not FINAL:
        return
    if last_of(counter, units, "relaxed"):
        for first in range(0, batches, SEQUENCES):
            sequence = first + tl.arange(0, SEQUENCES)
            sound = (sequence < batches) & (code == 0)
            tl.atomic_add(counts + sequence, NEW, mask=sound, sem="relaxed")
            tl.atomic_add(lengths + sequence, NEW, mask=sound, sem="relaxed")


@triton.jit(
    do_not_specialize=["start", "horizon", "room", "batches", "rank", "ends_step"],
    do_not_specialize_on_alignment=["positions", "counts", "lengths", "fault", "ends", "words", "message"],
)
def attend_kernel(
    q, k, v,  # new: (pointer, strides of batch, token and head)
    k_kept, v_kept,  # [B, C, G, D], [B, C, G, V], as `at_rows` takes them
    positions, counts, lengths, fault,  # of the store
    ends, ends_step,  # int32 [R, 2, P, N], and 0 if R is 1, else the stride
    slopes, sinks,  # [H], read where ALIBI and SINKS
    message, words,  # [B, n * H * (V + 2) + 4] as float32 and as int32, written unless FINAL
    out, lse,  # [B, n, H, V], float32 [B, n, H]: written where FINAL
    scratch,  # between splits: float32 [units, SPLITS, BLOCK_M, V], [2, units, SPLITS, BLOCK_M], and [units], faults
    counters,  # int32 [1 + units], zeros before and after
    scale, softcap, start, horizon, room, batches, rank,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    NEW: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr, E: tl.constexpr, KEYS: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, HALVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr, AHEAD: tl.constexpr, SP: tl.constexpr, MERGE_M: tl.constexpr,
    FINAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time read the same rows of memory: the heads of a key side by side.
    column, split = tl.program_id(0) % (G * BLOCKS), tl.program_id(0) // (G * BLOCKS) % SPLITS
    batch = tl.program_id(0) // (G * BLOCKS * SPLITS)
    head, units, unit = column % G, batches * (G * BLOCKS), batch * (G * BLOCKS) + column
    length = tl.load(lengths + batch)
    count = tl.minimum(tl.load(counts + batch * W + rank), room)
    here = positions + batch.to(tl.int64) * room
    sample = samples(here, room, LANES, LEVELS)
    first = column // G * BLOCK_M
    rows = first + tl.arange(0, HALVES * BLOCK_M) % BLOCK_M
    token, exists, head_of_row = rows // GROUP, rows < NEW * GROUP, head * GROUP + rows % GROUP
    query = new_rows(q, batch, token, head_of_row, exists, D, DP)
    q_pos, slope = length + token, 0.0 * rows
    if ALIBI:
        slope = tl.load(slopes + head_of_row, mask=exists, other=0.0).to(tl.float32)
    since = first // GROUP
    row_of_table = ends + batch.to(tl.int64) * ends_step
    lo, hi = global_ends(row_of_table, length + since - start, NEW - since, horizon, PARTS, NP, E)
    local_lo, local_hi = local_ends(here, sample, count, lo, hi, LEVELS)

    state = (
        tl.full([HALVES * BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([HALVES * BLOCK_M], tl.float32),
        tl.zeros([HALVES * BLOCK_M, VP], tl.float32),
    )
    step = units.to(tl.int64) * (SPLITS * BLOCK_M)
    parts = (scratch, scratch + step * V, step, scratch + step * (V + 2))
    code = 0
    if split == 0:
        cache = (positions, counts, lengths, fault, start, horizon, room, batches, rank)
        state, code = first_split(
            state, query, q_pos, slope, token - since, lo, hi, k, v, (k_kept, v_kept), cache, batch, head, column == 0,
            scale, softcap, NEW, PARTS, NP, W, WP, D, V, DP, VP, KEYS, SOFTCAP, ALIBI,
        )  # fmt: skip
        if SPLITS > 1:
            tl.store(parts[3] + unit, code.to(tl.float32))
        if column == 0:
            write_words(words, q, counts, lengths, batch, W, WP, G * GROUP, NEW, D, V, FINAL)
    state = visit(
        state, query, q_pos, slope, token - since, local_lo, local_hi, k_kept, v_kept, here, split, batch, head, room,
        scale, softcap, PARTS, NP, D, V, DP, VP, BLOCK_N, SPLITS, AHEAD, SOFTCAP, ALIBI,
    )  # fmt: skip
    m, l, acc = together(state, BLOCK_M, HALVES)

    result = (out, lse) if FINAL else (message, message)
    if SPLITS == 1:
        row = tl.arange(0, BLOCK_M)
        leave_rows(
            (m, l, acc), row, result, batch, head, first, code, sinks, G, GROUP, NEW, V, FINAL, SINKS
        )  # fmt: skip
        grow(counters, units, code, counts, lengths, batches, NEW, FINAL)
    else:
        store_partial(parts, unit, split, (m, l, acc), first, NEW * GROUP, SPLITS, V)
        tl.debug_barrier()
        if last_of(counters + 1 + unit, SPLITS, "acq_rel"):
            leave_unit(
                parts, unit, units, result, batch, batches, head, first, sinks, counters, counts, lengths,
                G, GROUP, NEW, SPLITS, SP, V, VP, BLOCK_M, MERGE_M, FINAL, SINKS,
            )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- merge


@triton.jit
def differ(words, length, batches, W: tl.constexpr, WP: tl.constexpr):
    """Whether the words of any rank are not those of the first, of any sequence. ``length`` of a message."""
    found = 0
    for first in range(0, batches, SEQUENCES):
        number = tl.arange(0, SEQUENCES * WORDS)
        sequence = first + number // WORDS
        at = words + (sequence.to(tl.int64) + 1) * length - WORDS + number % WORDS
        ranks = tl.arange(0, WP)[:, None]
        exists = (sequence < batches)[None, :]
        told = tl.load(at, mask=sequence < batches, other=0)
        others = at[None, :] + ranks.to(tl.int64) * batches * length
        other = tl.load(others, mask=(ranks < W) & exists, other=0)
        found += tl.sum(tl.sum(((ranks < W) & (other != told[None, :])).to(tl.int32), 1), 0)
    return found > 0


@triton.jit
def grow_dealt(counts, lengths, batch, NEW: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """A sequence's new keys, dealt as by `distflash.cache_balance.storing_ranks`."""
    ranks = tl.arange(0, WP)
    each = tl.load(counts + batch * W + ranks, mask=ranks < W, other=0)
    lacking = tl.where(ranks < W, each[:, None] - each[None, :] + (ranks[None, :] < ranks[:, None]).to(tl.int32), 0)
    kept = tl.zeros([WP], tl.int32)
    for i in range(NEW):
        own = (ranks[:, None] == ranks[None, :]) | (ranks >= W)[None, :]
        before = tl.sum(tl.where(own, 0, tl.maximum(lacking + i, 0)), 1) + i
        kept += (before < NEW).to(tl.int32)
    tl.store(counts + batch * W + ranks, each + kept, mask=ranks < W)
    tl.store(lengths + batch, tl.load(lengths + batch) + NEW)


@triton.jit(
    do_not_specialize=["batches"],
    do_not_specialize_on_alignment=["counts", "lengths", "fault", "messages", "words"],
)
def merge_kernel(
    messages, words,  # [W, B, n * H * (V + 2) + 4] as float32 and as int32
    counts, lengths, fault,  # of the store
    sinks, out, lse,  # [H], read where SINKS; [B, n, H, V], float32 [B, n, H]
    batches,
    HEADS: tl.constexpr, NEW: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    BLOCK_M: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (NEW * HEADS + BLOCK_M - 1) // BLOCK_M
    rank_step: tl.constexpr = NEW * HEADS * (V + 2) + WORDS
    batch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    code = tl.load(fault)
    if code == 0:
        code = tl.where(differ(words, rank_step, batches, W, WP), DIFFER, 0)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < NEW * HEADS
    dims = tl.arange(0, VP)[None, :]
    mask = exists[:, None] & (dims < V)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VP], tl.float32)
    for rank in range(W):
        at = messages + (rank * batches.to(tl.int64) + batch) * rank_step
        theirs = tl.load(at + NEW * HEADS * V + rows, mask=exists, other=float("-inf")) * LOG2E
        total = tl.load(at + NEW * HEADS * (V + 1) + rows, mask=exists, other=0.0)
        weighted = tl.load(at + rows[:, None] * V + dims, mask=mask, other=0.0)
        most = tl.maximum(m, theirs)
        shift = tl.where(most == float("-inf"), 0.0, most)
        before, now = tl.exp2(m - shift), tl.exp2(theirs - shift)
        l, acc, m = l * before + total * now, acc * before[:, None] + weighted * now[:, None], most
    sink = sinks_of(sinks, rows % HEADS, exists, SINKS)
    leave((out, lse), batch, NEW * HEADS, rows, exists, m, l, acc, code, sink, V, True, SINKS)
    if block == 0:
        if code == 0:
            grow_dealt(counts, lengths, batch, NEW, W, WP)
        if batch == 0:
            tl.store(fault, code)
