"""The producer warp of the forward kernel: it takes work tiles, publishes them, and loads their Q, K and V.

[Note: shapes] as in `common`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from distflash.kernels.hopper.common import (
    BEGUN_BITS,
    ENDS,
    LIVE,
    ROWS,
    STARTS,
    advance,
    leave,
    locate,
    next_job,
    nth,
    pick,
    post,
    span,
    sync,
)
from distflash.kernels.hopper.compat import async_load
from distflash.kernels.hopper.dropout import IN_TILES

# Named barriers, besides those that the compiler uses; there is one per stage.
K_FREE = gl.constexpr(8)
V_FREE = gl.constexpr(12)


@gluon.jit
def make_gates(CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr):
    """The mbarriers between the producer warp and the consumers: of Q's slots, and of the stages of K and V."""
    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], one)
    q_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], one)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    for n in gl.static_range(SLOTS):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(q_free.index(n), count=CONSUMERS)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(n), count=1)
        mbarrier.init(v_ready.index(n), count=1)
    fence_async_shared()
    return q_ready, q_free, k_ready, v_ready


@gluon.jit
def load_keys(
    k, v, batch, kv_head, part, smem, gates, stage, loaded,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load one source's tiles of keys and values, as stages become free."""
    k_smem, v_smem, k_ready, v_ready = smem[1], smem[2], gates[2], gates[3]
    begin, before, full, tiles = part
    for i in range(tiles):
        start = begin + nth(i, before, full, tiles - full) * BLOCK_N
        if loaded >= STAGES:
            sync(K_FREE + stage, 32 + CONSUMERS * 128)
        mbarrier.expect(k_ready.index(stage), k.block_type.nbytes)
        async_load(k, [batch, kv_head, start, 0], k_ready.index(stage), k_smem.index(stage))
        if loaded >= STAGES:
            sync(V_FREE + stage, 32 + CONSUMERS * 128)
        mbarrier.expect(v_ready.index(stage), v.block_type.nbytes)
        async_load(v, [batch, kv_head, start, 0], v_ready.index(stage), v_smem.index(stage))
        loaded += 1
        stage = advance(stage, 0, STAGES)[0]
    return stage, loaded


@gluon.jit
def at_least_one(begin, tiles, others, BLOCK_N: gl.constexpr):
    """The first tile of a block and the number of its tiles; at least one, unless there are ``others``.

    Where no key is visible, the one tile is before the first key, where TMA reads zeros. It keeps the pipeline simple.
    """
    none = tiles + others == 0
    return gl.where(none, -BLOCK_N, begin), gl.where(none, 1, tiles)


@gluon.jit
def load_block(
    q, source, other, smem, gates, jobs, where, begun, ring,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    TWO: gl.constexpr, ALIGN: gl.constexpr,
):  # fmt: skip
    """Publish a work tile and load Q, then its K and V. Heads that have ``begun`` read the second source only."""
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    q_smem, _, _ = smem
    q_ready, q_free, _, _ = gates
    k, v, ends = source
    other_k, other_v, other_ends = other
    first, flags, batch, head, heads, queries = where
    slot, slot_phase, stage, loaded = ring
    last = gl.minimum(first + BLOCK_M, queries) - 1
    begin, before, full, tiles = span(ends[0], ends[1], first, last, BLOCK_N, ALIGN)
    place = (first, batch * heads + head, flags & ENDS, flags & STARTS)
    if TWO:
        tiles = gl.where(begun, 0, tiles)
        full = gl.where(begun, 0, full)
        begin_2, before_2, full_2, tiles_2 = span(other_ends[0], other_ends[1], first, last, BLOCK_N, ALIGN)
        begin_2, tiles_2 = at_least_one(begin_2, tiles_2, tiles, BLOCK_N)
        mbarrier.wait(q_free.index(slot), slot_phase)
        post(jobs, slot, place + (begin, before, full, tiles, begin_2, before_2, full_2, tiles_2))
    else:
        begin, tiles = at_least_one(begin, tiles, 0, BLOCK_N)
        mbarrier.wait(q_free.index(slot), slot_phase)
        post(jobs, slot, place + (begin, before, full, tiles))
    mbarrier.expect(q_ready.index(slot), CONSUMERS * q.block_type.nbytes)
    for w in gl.static_range(CONSUMERS):
        async_load(q, [batch, head, first + w * ROWS, 0], q_ready.index(slot), q_smem.index(slot * CONSUMERS + w))
    slot, slot_phase = advance(slot, slot_phase, SLOTS)
    stage, loaded = load_keys(
        k, v, batch, head // GROUP, (begin, before, full, tiles), smem, gates, stage, loaded,
        BLOCK_N, CONSUMERS, STAGES,
    )  # fmt: skip
    if TWO:
        stage, loaded = load_keys(
            other_k, other_v, batch, head // GROUP, (begin_2, before_2, full_2, tiles_2), smem, gates, stage,
            loaded, BLOCK_N, CONSUMERS, STAGES,
        )  # fmt: skip
    return slot, slot_phase, stage, loaded


@gluon.jit
def load_tiles(
    q, source, other, smem, gates, jobs, counter, grid,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    TWO: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """The producer warp: one work tile after the other."""
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    q_ready, q_free, _, _ = gates
    queries, heads, head_count, begun_heads, batches, heads_at_once, programs, groups, blocks, marks = grid
    slot, slot_phase, stage, loaded = 0, 1, 0, 0
    program = gl.program_id(0)
    while program < blocks * head_count * batches:
        block, place = pick(program, blocks, head_count * batches, heads_at_once)
        batch, head = place // head_count, place % head_count
        # Longest first: with causal masks later rows see more keys.
        first, flags = locate((blocks - 1 - block) * BLOCK_M, groups, marks)
        begun = head < begun_heads
        if TWO:
            flags = gl.where(begun, flags >> BEGUN_BITS, flags)
        if (flags & LIVE) != 0:  # 0 only for heads that have begun
            slot, slot_phase, stage, loaded = load_block(
                q, source, other, smem, gates, jobs, (first, flags, batch, head, heads, queries), begun,
                (slot, slot_phase, stage, loaded), SLOTS, GROUP, BLOCK_N, CONSUMERS, STAGES, TWO,
                BLOCK_N if DROPOUT == IN_TILES else 1,
            )  # fmt: skip
        program = next_job(counter, programs)
    mbarrier.wait(q_free.index(slot), slot_phase)
    if TWO:
        post(jobs, slot, (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    else:
        post(jobs, slot, (0, 0, 0, 0, 0, 0, 0, 0))
    mbarrier.arrive(q_ready.index(slot))
    leave(counter, programs)
