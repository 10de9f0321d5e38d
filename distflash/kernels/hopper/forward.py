"""The forward kernel for Hopper: consumer warpgroups in ping-pong, fed by one producer warp.

After FlashAttention-3 (https://arxiv.org/abs/2407.08608): each consumer warpgroup has 64 queries. Q K^T of the
next tile is issued first, then P V of this one. While one warpgroup computes its softmax, the other's products run. The
state between passes is that of the portable kernel. The accumulator is rescaled only where a maximum has changed
(after FlashAttention-4, https://arxiv.org/abs/2603.05451): see `common.rescale`.

The grid is persistent, with one program per multiprocessor. The producer warp takes the next work tile (a block of
queries of a head) from an atomic counter as soon as a slot for Q is free, publishes it to the consumers, and prefetches
its tiles of keys and values while they finish the previous work tile.

The keys of a work tile come from one source, or from two in order. With `LiveRows` a pass processes only groups of rows
that see at least one of its keys (`distflash.liveness`). Begun heads (`Pass.begun`) attend to the second source only,
so they have no work in a group that sees keys of the first source only. The producer publishes no work tile for such a
group and head. A group has several blocks of queries, so one of them may see no key, as may any block without
`LiveRows`. It gets one tile of zeros (`forward_loads.at_least_one`), since a work tile without tiles of keys is the end
mark: the producer publishes it after the last work tile, and it tells the consumers that they are done.

IN_TURN: a warpgroup does not overlap its own softmax with its own products (`attend_in_turn`). Otherwise P V runs
during the softmax of the next tile (`attend`). DROPOUT: 0 for none, else `kernels.hopper.dropout.IN_TILES` (the
positions in a tile are consecutive and start at a multiple of 16, so only the first is loaded) or ANYWHERE (each is
loaded).

Names: ``smem`` is Q, K and V in shared memory; ``gates`` are the mbarriers q_ready, q_free, k_ready and v_ready. At the
named barriers ``K_FREE + stage`` and ``V_FREE + stage`` the consumers tell the producer that a stage may be
overwritten.

[Note: shapes] as in `common`: D and V head dims, DP and VP these padded to the next power of two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distflash.kernels.hopper.common import (
    LOG2E,
    ROWS,
    advance,
    arrive,
    arrive_after,
    column_chunks,
    columns_of,
    half_parts,
    halves,
    in_parts,
    inside,
    nth,
    pack,
    product_layout,
    read,
    rescale,
    row_max,
    row_parts,
    row_products,
    sync,
    tanh,
    whole,
)
from distflash.kernels.hopper.compat import store_wait
from distflash.kernels.hopper.dropout import kept, key_and_offset, positions, strips
from distflash.kernels.hopper.forward_loads import K_FREE, V_FREE, load_tiles, make_gates
from distflash.kernels.hopper.forward_state import LOWEST, end_state, start_state

# Number of a named barrier. Warpgroup ``w`` waits at ``TURN + w`` for its turn to issue products (ping-pong). Other
# numbers are the compiler's and those of `forward_loads`.
TURN = gl.constexpr(5)
MAX_STAGES = gl.constexpr(4)
# How many scalars describe a work tile.
# PLACE, what its epilogue needs: its first query; its plane (batch * H + head); whether this pass is its last.
# JOB: those of PLACE; whether this pass is its first; and for the source's keys (begin, before, full, tiles). The keys
#   from ``begin`` on are divided into ``tiles`` consecutive tiles. The first ``before`` of these need the mask, the
#   next ``full`` do not, and the rest need it again.
# JOB_2: those of JOB, and the same four for the second source.
PLACE = gl.constexpr(3)
JOB = gl.constexpr(8)
JOB_2 = gl.constexpr(12)


@gluon.jit
def read_job(jobs, slot, TWO: gl.constexpr):
    """A work tile's 12 scalars in the order of JOB_2; the last four are 0 without a second source."""
    if TWO:
        return read(jobs, slot, JOB_2, JOB_2)
    else:
        none = gl.to_tensor(0)
        return read(jobs, slot, JOB, JOB) + (none, none, none, none)


@gluon.jit
def read_place(jobs, slot, TWO: gl.constexpr):
    """The first scalars of a work tile, read again instead of being kept in registers."""
    return read(jobs, slot, JOB_2 if TWO else JOB, PLACE)


@gluon.jit
def tile_at(i, job, BLOCK_N: gl.constexpr, TWO: gl.constexpr):
    """What is known of the ``i``-th tile of keys that a block visits: its first key; whether it needs the mask; whether
    it is the second source's. Of each source, first all tiles that need the mask are visited, then the full ones
    between them, which do not need it: see `nth`.
    """
    begin, before, full, tiles, begin_2, before_2, full_2, tiles_2 = job
    theirs = i >= tiles
    if TWO:
        i = gl.where(theirs, i - tiles, i)
        begin = gl.where(theirs, begin_2, begin)
        before = gl.where(theirs, before_2, before)
        full = gl.where(theirs, full_2, full)
        tiles = gl.where(theirs, tiles_2, tiles)
    masked = tiles - full
    return begin + nth(i, before, full, masked) * BLOCK_N, i < masked, theirs


@gluon.jit
def scores(s, tile, intervals, scale, softcap, layout: gl.constexpr, SOFTCAP: gl.constexpr, TWO: gl.constexpr):
    """From raw products ``s [ROWS, N]``: masked scores, and the factor that brings them to base 2.

    intervals: for each row the first key that it sees and how many; then the same of the second source.
    """
    start, masked, theirs = tile
    lo, length, lo_2, length_2 = intervals
    factor = scale * LOG2E
    if SOFTCAP:
        s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        factor = 1.0
    if masked:  # known at run time only: a tile inside all intervals skips the comparison
        if TWO:
            lo = gl.where(theirs, lo_2, lo)
            length = gl.where(theirs, length_2, length)
        s = gl.where(inside(lo - start, length, s.shape[1], layout), s, float("-inf"))
    return s, factor


@gluon.jit
def follow(s, factor, m):
    """The new maximum, and the base-2 logarithm of the rescaling factor, 0 where the maximum does not change."""
    m_new = gl.maximum(m, row_max(s) * factor)
    return m_new, m - m_new


@gluon.jit
def exponentials(s, factor, m, l, change):
    """P in float32, and the partial row sums: each thread has the sums of its own columns.

    l: these sums of the previous tiles. `in_parts` converts one value per row to the layout of these sums.
    """
    p = gl.exp2(s * factor - m[:, None])
    return p, l * in_parts(gl.exp2(change), l) + row_parts(p)


@gluon.jit
def positions_at(tile, drop, COUNT: gl.constexpr, layout: gl.constexpr, TWO: gl.constexpr, DROPOUT: gl.constexpr):
    """The positions of a tile's keys, see `dropout.positions`; loaded before its scores are needed."""
    if DROPOUT == 0:
        return 0
    else:
        start, _, theirs = tile
        _, _, _, _, k_positions, other_k_positions, keys, other_keys = drop
        columns: gl.constexpr = gl.SliceLayout(0, layout)
        if not TWO:
            return positions(k_positions, start, keys, COUNT, columns, DROPOUT)
        else:  # the tile belongs to one source; for the other the number of keys is set to 0, so its load gives zeros
            ours = positions(k_positions, start, gl.where(theirs, 0, keys), COUNT, columns, DROPOUT)
            return ours + positions(other_k_positions, start, gl.where(theirs, other_keys, 0), COUNT, columns, DROPOUT)


@gluon.jit
def thinned(p, at, drop, DROPOUT: gl.constexpr):
    """P with 0 where it is dropped. The row sums were computed before, and include what is dropped."""
    if DROPOUT != 0:
        q_at, q_strip, key, threshold, _, _, _, _ = drop
        k_strip = strips(at, 0, p.shape[1], p.shape[1], DROPOUT)
        keep = kept(q_at, q_strip, at, k_strip, key, threshold, p, False, DROPOUT)
        p = gl.where(keep, p, 0.0)
    return p


@gluon.jit
def rounded(p, at, drop, like, DROPOUT: gl.constexpr):
    """`thinned`, in the dtype of ``like``, two elements an instruction.

    Without `pack` the compiler would round first, and then set the dropped elements to 0 one by one.
    """
    if DROPOUT != 0:
        return pack(thinned(p, at, drop, DROPOUT), like)
    else:
        return p.to(like.dtype)


@gluon.jit
def multiply(
    w: gl.constexpr, q, p, acc, smem, gates, stage, phase,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, mma_s: gl.constexpr,
):  # fmt: skip
    """Issue Q K^T of the next tile and P V of this one, when it is this warpgroup's turn (ping-pong)."""
    k_smem, v_smem, k_ready, v_ready = smem[1], smem[2], gates[2], gates[3]
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    following, following_phase = advance(stage, phase, STAGES)
    mbarrier.wait(k_ready.index(following), following_phase)
    mbarrier.wait(v_ready.index(stage), phase)
    sync(TURN + w, 256)
    key = k_smem.index(following).reshape([BLOCK_N, k_smem.shape[4]])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=mma_s)
    s = row_products(q, key, zeros)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, v_smem.shape[4]]), acc, is_async=True)
    arrive(TURN + (w + 1) % CONSUMERS, 256)
    return s, acc, following, following_phase


@gluon.jit
def attend(
    w: gl.constexpr, state, q, smem, gates, tile, intervals, scale, softcap, zero, drop,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, mma_s: gl.constexpr, mma_o: gl.constexpr, SOFTCAP: gl.constexpr,
    HALVES: gl.constexpr, TWO: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Issue Q K^T of ``tile`` and P V of the previous tile, and compute the softmax of ``tile``. P V runs during the
    first part of the softmax: until the row maxima are known, or if HALVES until half of the exponentials are computed.

    zero: always 0, but computed at run time, so that the assembler cannot know it. `arrive_after` selects the barrier
    ``number`` or ``number + zero`` by a result of the softmax. Both are the same barrier, but the assembler cannot know
    this, and so cannot move the arrival above the softmax.
    """
    m, l, acc, p, stage, phase = state
    at = positions_at(tile, drop, smem[1].shape[3], mma_s, TWO, DROPOUT)
    EVERYBODY: gl.constexpr = 32 + CONSUMERS * 128
    if TWO and acc.shape[1] > 128:
        zero = stage // MAX_STAGES  # computed, since no register is free to keep it
    s, acc, following, following_phase = multiply(w, q, p, acc, smem, gates, stage, phase, CONSUMERS, STAGES, mma_s)
    s = warpgroup_mma_wait(1, [s])
    s, factor = scores(s, tile, intervals, scale, softcap, mma_s, SOFTCAP, TWO)
    m, change = follow(s, factor, m)
    # The arrival at K_FREE needs results of this softmax, and the wait for P V follows the arrival. Otherwise the
    # assembler would move the wait for P V up to the wait for Q K^T, and nothing would overlap.
    if HALVES:
        # Split before the subtraction, so that the assembler interleaves subtractions and exponentials: 1% faster.
        left, right = halves(s)
        m_left, m_right = halves(m[:, None] + gl.zeros_like(s))
        left, right = left * factor - m_left, right * factor - m_right
        left = gl.exp2(left)
        l = l * in_parts(gl.exp2(change), l) + gl.convert_layout(half_parts(left), l.type.layout)
        l = arrive_after(l, K_FREE + following, K_FREE + following + zero, EVERYBODY)
    else:
        m = arrive_after(m, K_FREE + following, K_FREE + following + zero, EVERYBODY)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    arrive(V_FREE + stage, EVERYBODY)
    acc = rescale(acc, change)
    if HALVES:
        right = gl.exp2(right)
        l = l + gl.convert_layout(half_parts(right), l.type.layout)
        p32 = whole(left, right, s)
    else:
        p32, l = exponentials(s, factor, m, l, change)
    p = gl.convert_layout(rounded(p32, at, drop, p, DROPOUT), p.type.layout)
    return m, l, acc, p, following, following_phase


@gluon.jit
def attend_in_turn(
    w: gl.constexpr, state, q, smem, gates, tile, intervals, scale, softcap, drop,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, mma_s: gl.constexpr, mma_o: gl.constexpr, SOFTCAP: gl.constexpr,
    TWO: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """A tile's softmax, then its P V and the next tile's Q K^T, and the wait for both products."""
    m, l, acc, s, stage, phase = state
    at = positions_at(tile, drop, smem[1].shape[3], mma_s, TWO, DROPOUT)
    EVERYBODY: gl.constexpr = 32 + CONSUMERS * 128
    s, factor = scores(s, tile, intervals, scale, softcap, mma_s, SOFTCAP, TWO)
    m, change = follow(s, factor, m)
    acc = rescale(acc, change)
    p32, l = exponentials(s, factor, m, l, change)
    p = gl.convert_layout(pack(thinned(p32, at, drop, DROPOUT), q[0]), gl.DotOperandLayout(0, mma_o, k_width=2))
    s, acc, following, following_phase = multiply(w, q, p, acc, smem, gates, stage, phase, CONSUMERS, STAGES, mma_s)
    s = warpgroup_mma_wait(1, [s])
    arrive(K_FREE + following, EVERYBODY)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    arrive(V_FREE + stage, EVERYBODY)
    return m, l, acc, s, following, following_phase


@gluon.jit
def block(
    w: gl.constexpr, state, query, smem, gates, stage, phase, job, intervals, scale, softcap, zero, previous, q_free,
    drop, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, mma_s: gl.constexpr, mma_o: gl.constexpr,
    SOFTCAP: gl.constexpr, IN_TURN: gl.constexpr, HALVES: gl.constexpr, TWO: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Attend to all tiles of keys. previous: the slot of the previous work tile's Q, which is freed here, or -1."""
    m, l, acc = state
    _, k_smem, v_smem = smem
    _, _, k_ready, v_ready = gates
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    VP: gl.constexpr = v_smem.shape[4]
    mbarrier.wait(k_ready.index(stage), phase)
    key = k_smem.index(stage).reshape([BLOCK_N, k_smem.shape[4]])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=mma_s)
    s = row_products(query, key, zeros)
    s = warpgroup_mma_wait(0, [s])
    arrive(K_FREE + stage, 32 + CONSUMERS * 128)
    # One of the threads that share a row starts with the row's running total, the others with 0.
    parts = row_parts(zeros)
    column = gl.arange(0, parts.shape[1], layout=gl.SliceLayout(0, parts.type.layout))[None, :]
    l = gl.where(column == 0, in_parts(l, parts), 0.0)
    tiles = job[3] + job[7]
    if IN_TURN:
        if previous >= 0:  # wait for the store of the previous block's O, which is in the slot of its Q
            store_wait(0)
            mbarrier.arrive(q_free.index(previous))
        for i in range(tiles - 1):
            m, l, acc, s, stage, phase = attend_in_turn(
                w, (m, l, acc, s, stage, phase), query, smem, gates, tile_at(i, job, BLOCK_N, TWO), intervals, scale,
                softcap, drop, CONSUMERS, STAGES, mma_s, mma_o, SOFTCAP, TWO, DROPOUT,
            )  # fmt: skip
        tile = tile_at(tiles - 1, job, BLOCK_N, TWO)
    else:
        tile = tile_at(0, job, BLOCK_N, TWO)
    at = positions_at(tile, drop, BLOCK_N, mma_s, TWO, DROPOUT)
    s, factor = scores(s, tile, intervals, scale, softcap, mma_s, SOFTCAP, TWO)
    fresh = m == LOWEST  # the row has seen no key yet
    m, change = follow(s, factor, m)
    p32, l = exponentials(s, factor, m, l, change)
    p = gl.convert_layout(rounded(p32, at, drop, k_smem, DROPOUT), gl.DotOperandLayout(0, mma_o, k_width=2))
    acc = rescale(acc, gl.where(fresh, 0.0, change))  # an accumulator of zeros needs no rescaling
    if not IN_TURN:
        if previous >= 0:
            store_wait(0)
            mbarrier.arrive(q_free.index(previous))
        for i in range(1, tiles):
            m, l, acc, p, stage, phase = attend(
                w, (m, l, acc, p, stage, phase), query, smem, gates, tile_at(i, job, BLOCK_N, TWO), intervals, scale,
                softcap, zero, drop, CONSUMERS, STAGES, mma_s, mma_o, SOFTCAP, HALVES, TWO, DROPOUT,
            )  # fmt: skip
    mbarrier.wait(v_ready.index(stage), phase)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, VP]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    arrive(V_FREE + stage, 32 + CONSUMERS * 128)
    stage, phase = advance(stage, phase, STAGES)
    return (m, gl.convert_layout(gl.sum(l, 1), m.type.layout), acc), stage, phase


@gluon.jit
def dropping_of(
    first, plane, sizes, dropping, layout: gl.constexpr, BLOCK_N: gl.constexpr, DROPOUT: gl.constexpr
):  # fmt: skip
    """The tuple that `thinned` takes as ``drop``, for the rows of a block from ``first`` on."""
    seed, heads_before, threshold, _, q_positions, k_positions, other_k_positions, keys, other_keys = dropping
    if DROPOUT == 0:
        return (0, 0, 0, 0, 0, 0, 0, 0)
    else:
        queries, heads = sizes
        rows: gl.constexpr = gl.SliceLayout(1, layout)
        key, offset = key_and_offset(seed, plane, heads, heads_before)
        at = positions(q_positions, first, queries, ROWS, rows, DROPOUT)
        strip = strips(at, 1, ROWS, BLOCK_N, DROPOUT) + offset
        return (at, strip, key, threshold, k_positions, other_k_positions, keys, other_keys)


@gluon.jit
def consume(
    w: gl.constexpr, final, smem, gates, jobs, ends, sinks, lse, running, scale, softcap, sizes, dropping,
    SLOTS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, V: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, IN_TURN: gl.constexpr, HALVES: gl.constexpr,
    TWO: gl.constexpr, MAXIMA: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Consumer warpgroup ``w``: 64 queries of every block."""
    q_smem, _, v_smem = smem
    q_ready, q_free, _, _ = gates
    row_lo, row_hi, other_lo, other_hi = ends
    queries = sizes[0]
    keep_scale = dropping[3]
    VP: gl.constexpr = v_smem.shape[4]
    mma_s: gl.constexpr = product_layout(BLOCK_N)
    mma_o: gl.constexpr = product_layout(VP)
    if w == CONSUMERS - 1:
        arrive(TURN, 256)  # the first turn is the first warpgroup's

    stage, phase, slot, slot_phase, previous = 0, 0, 0, 0, -1
    mbarrier.wait(q_ready.index(slot), slot_phase)
    first, plane, _, starts, begin_1, before, full, tiles, begin_2, before_2, full_2, tiles_2 = read_job(
        jobs, slot, TWO
    )
    while tiles + tiles_2 > 0:
        first += w * ROWS
        rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_s))
        exists = rows < queries
        lo = gl.load(row_lo + rows, mask=exists, other=0)
        length = gl.load(row_hi + rows, mask=exists, other=0) - lo
        lo_2 = lo
        length_2 = length
        if TWO:
            lo_2 = gl.load(other_lo + rows, mask=exists, other=0)
            length_2 = gl.load(other_hi + rows, mask=exists, other=0) - lo_2
        drop = dropping_of(first, plane, sizes, dropping, mma_s, BLOCK_N, DROPOUT)
        state = start_state(
            sinks, running, first, plane, starts, sizes, keep_scale, V, VP, mma_s, mma_o, SINKS and not MAXIMA, DROPOUT
        )
        q_slot = q_smem.index(slot * CONSUMERS + w)  # later O, too
        # A tuple of views that together cover D columns, since a view's width is a power of two.
        query = column_chunks(q_slot.reshape([ROWS, q_smem.shape[4]]), columns_of(D))
        job = (begin_1, before, full, tiles, begin_2, before_2, full_2, tiles_2)
        # ``queries >> 31`` is 0, but the assembler cannot know that lengths are not negative: see `arrive_after`.
        state, stage, phase = block(
            w, state, query, smem, gates, stage, phase, job, (lo, length, lo_2, length_2), scale, softcap,
            queries >> 31, previous, q_free, drop, CONSUMERS, STAGES, mma_s, mma_o, SOFTCAP, IN_TURN, HALVES, TWO,
            DROPOUT,
        )  # fmt: skip
        first, plane, is_last = read_place(jobs, slot, TWO)
        end_state(
            state, final, q_slot, lse, sinks, running, first + w * ROWS, plane, is_last, sizes, keep_scale, V, VP,
            mma_s, mma_o, SINKS, MAXIMA, DROPOUT,
        )  # fmt: skip
        if SLOTS > 1:
            previous = slot
        else:  # with one slot, the next work tile's Q needs this slot
            store_wait(0)
            mbarrier.arrive(q_free.index(slot))
        slot, slot_phase = advance(slot, slot_phase, SLOTS)
        mbarrier.wait(q_ready.index(slot), slot_phase)
        first, plane, _, starts, begin_1, before, full, tiles, begin_2, before_2, full_2, tiles_2 = read_job(
            jobs, slot, TWO
        )
    store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "queries", "heads", "batches", "head_count", "begun_heads", "blocks", "flags", "heads_at_once", "programs",
        "heads_before", "threshold", "keys", "other_keys",
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, row_lo, row_hi,  # descriptors of [B, H, T, D], [B, G, K, D], [B, G, K, V]; int32 [T]
    other_k, other_v, other_lo, other_hi,  # the same of the second source, read if TWO
    sinks,  # [H], read if SINKS
    # The result: a descriptor of [B, H, T, V] in q's dtype, and float32 [B, H, T]. Written in the last pass of a row.
    final, lse,
    # The running state: float32 [B, H, T], [B, H, T], [B, T, H, V]. Written in all other passes. If MAXIMA, the maximum
    # is written in the last pass, too, and does not count sinks.
    maximum, total, weighted,
    counter,  # int32 [2], zeros, and zeros again afterwards: how many work tiles were taken; how many programs are done
    scale, softcap, queries, heads, batches,
    head_count,  # the number of query heads that this launch processes
    begun_heads,  # if TWO, the number of query heads of the begun key heads, which `Pass.begun` counts
    # The flags of a row are three bits: live, first pass, last pass; and three more, for the begun heads.
    # Without LiveRows: groups is not read, blocks counts all blocks of queries, flags are those of all rows.
    # With LiveRows: groups is `LiveRows.groups`, int32 [N, 2], the first row and the flags of each group (GROUP_ROWS
    # rows, several blocks of queries); blocks counts the blocks of queries in all groups; flags is -1.
    groups, blocks, flags,
    heads_at_once,  # how many query heads are worked on at a time; their K and V stay in L2, see `common.pick`
    programs,  # the size of the grid
    # The fields of `dropout.Dropout`; heads_before is its first_head. Only read if DROPOUT, as the positions are.
    seed, heads_before, threshold, keep_scale,
    # Positions, int32: of queries [T], of each source's keys [K]; and the number of each source's keys.
    q_positions, k_positions, other_k_positions, keys, other_keys,
    # GROUP: query heads per key head.
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, SLOTS: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
    IN_TURN: gl.constexpr, HALVES: gl.constexpr, TWO: gl.constexpr, MAXIMA: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES <= MAX_STAGES)
    q_smem = gl.allocate_shared_memory(q.dtype, [SLOTS * CONSUMERS] + q.block_type.shape, q.layout)
    k_smem = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    v_smem = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    jobs = gl.allocate_shared_memory(
        gl.int32, [SLOTS * (JOB_2 if TWO else JOB), 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    gates = make_gates(CONSUMERS, SLOTS, STAGES)  # the mbarriers (q_ready, q_free, k_ready, v_ready)

    smem = (q_smem, k_smem, v_smem)
    source, other = (k, v, (row_lo, row_hi)), (other_k, other_v, (other_lo, other_hi))
    ends = (row_lo, row_hi, other_lo, other_hi)
    running, sizes = (maximum, total, weighted), (queries, heads)
    positions_of = (q_positions, k_positions, other_k_positions)
    dropping = (seed, heads_before, threshold, keep_scale) + positions_of + (keys, other_keys)
    grid = (queries, heads, head_count, begun_heads, batches, heads_at_once, programs, groups, blocks, flags)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (
                0, final, smem, gates, jobs, ends, sinks, lse, running, scale, softcap, sizes, dropping,
                SLOTS, BLOCK_N, D, V, CONSUMERS, STAGES, SOFTCAP, SINKS, IN_TURN, HALVES, TWO, MAXIMA, DROPOUT,
            )),
            (consume, (
                1, final, smem, gates, jobs, ends, sinks, lse, running, scale, softcap, sizes, dropping,
                SLOTS, BLOCK_N, D, V, CONSUMERS, STAGES, SOFTCAP, SINKS, IN_TURN, HALVES, TWO, MAXIMA, DROPOUT,
            )),
            (load_tiles, (
                q, source, other, smem, gates, jobs, counter, grid,
                SLOTS, GROUP, BLOCK_N, CONSUMERS, STAGES, TWO, DROPOUT,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (
                0, final, smem, gates, jobs, ends, sinks, lse, running, scale, softcap, sizes, dropping,
                SLOTS, BLOCK_N, D, V, CONSUMERS, STAGES, SOFTCAP, SINKS, IN_TURN, HALVES, TWO, MAXIMA, DROPOUT,
            )),
            (consume, (
                1, final, smem, gates, jobs, ends, sinks, lse, running, scale, softcap, sizes, dropping,
                SLOTS, BLOCK_N, D, V, CONSUMERS, STAGES, SOFTCAP, SINKS, IN_TURN, HALVES, TWO, MAXIMA, DROPOUT,
            )),
            (consume, (
                2, final, smem, gates, jobs, ends, sinks, lse, running, scale, softcap, sizes, dropping,
                SLOTS, BLOCK_N, D, V, CONSUMERS, STAGES, SOFTCAP, SINKS, IN_TURN, HALVES, TWO, MAXIMA, DROPOUT,
            )),
            (load_tiles, (
                q, source, other, smem, gates, jobs, counter, grid,
                SLOTS, GROUP, BLOCK_N, CONSUMERS, STAGES, TWO, DROPOUT,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 32])  # fmt: skip
