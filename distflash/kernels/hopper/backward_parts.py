"""Parts that both backward kernels for Hopper share: the producer warp, P from the log-sum-exp, and the epilogue.

[Note: shapes] as in `common`. ``stats`` is float32 ``[2, B * H, T]``: the log-sum-exp in base 2, and delta; see the
portable kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from distflash.kernels.hopper.common import (
    LOG2E,
    ROWS,
    advance,
    inside,
    leave,
    next_job,
    pick,
    post,
    span,
    sync,
    tanh,
    visited,
)
from distflash.kernels.hopper.compat import async_load

JOB = gl.constexpr(7)  # first, batch, kv_head, begin, before, full, tiles
# Named barriers, besides those that the compiler uses.
DS_READY = gl.constexpr(5)  # one per warpgroup and for each of two alternating tiles
FREE = gl.constexpr(13)  # of a stage
MAX_STAGES = gl.constexpr(2)
BOTH = gl.constexpr(256)  # threads of both warpgroups
BOTH_AND_WARP = gl.constexpr(288)


@gluon.jit
def make_gates(STAGES: gl.constexpr, JOB_READERS: gl.constexpr):
    """The mbarriers between the producer warp, both warpgroups, and other readers of work tiles."""
    one: gl.constexpr = mbarrier.MBarrierLayout()
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], one)
    kv_free = gl.allocate_shared_memory(gl.int64, [1], one)
    job_ready = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    job_free = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    dout_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    mbarrier.init(kv_ready, count=1)
    mbarrier.init(kv_free, count=2)
    for n in gl.static_range(2):
        mbarrier.init(job_ready.index(n), count=1)
        mbarrier.init(job_free.index(n), count=JOB_READERS)
    for n in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(dout_ready.index(n), count=1)
    fence_async_shared()
    return kv_ready, kv_free, job_ready, job_free, q_ready, dout_ready


@gluon.jit
def load_tiles(
    q, k, v, dout, stats, smem, gates, jobs, counter, block_ends, heads, batches, heads_at_once, programs,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, ORDERED: gl.constexpr = False,
):  # fmt: skip
    """The loading warp: a block's keys and values, then the queries, their dout and statistics, tile by tile.

    A block of keys that no query sees is left out: the host has written the zeros of its dK and dV. The tile of queries
    at which such an interval begins may lie beyond the last one of its head, so nothing may be read there or added.
    """
    q_smem, k_smem, v_smem, dout_smem, stats_smem = smem
    kv_ready, kv_free, job_ready, job_free, q_ready, dout_ready = gates
    col_lo, col_hi, keys, kv_heads = block_ends
    first_head, head_count = heads
    PARTS: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = PARTS * ROWS
    blocks = gl.cdiv(keys, BLOCK_N)
    slot, slot_phase, kv_phase, stage, loaded = 0, 1, 1, 0, 0
    issued: gl.constexpr = 0 if ORDERED else 1
    program = gl.program_id(0)
    if ORDERED:
        # Work tiles wait for earlier ones. So none belongs to a program that may not run yet: the counter deals all.
        program = next_job(counter, 0)
    while program < blocks * head_count * batches:
        block, nth_head = pick(program, blocks, head_count * batches, heads_at_once)
        first = block * BLOCK_N  # under causal masks earlier keys are seen by more: longest first
        last = gl.minimum(first + BLOCK_N, keys) - 1
        begin, before, full, tiles = span(col_lo, col_hi, first, last, BLOCK_M, BLOCK_M)
        batch, kv_head = nth_head // head_count, first_head + nth_head % head_count
        if tiles > 0:
            mbarrier.wait(job_free.index(slot), slot_phase)
            post(jobs, slot, (first, batch, kv_head, begin, before, full, tiles))
            mbarrier.arrive(job_ready.index(slot))
            slot, slot_phase = advance(slot, slot_phase, 2)
            mbarrier.wait(kv_free, kv_phase)
            kv_phase ^= 1
            mbarrier.expect(kv_ready, PARTS * (k.block_type.nbytes + v.block_type.nbytes))
            for n in gl.static_range(PARTS):
                async_load(k, [batch, kv_head, first + n * ROWS, 0], kv_ready, k_smem.index(n))
                async_load(v, [batch, kv_head, first + n * ROWS, 0], kv_ready, v_smem.index(n))
            for member in range(GROUP):
                head = kv_head * GROUP + member
                plane = (batch * kv_heads + kv_head) * GROUP + member
                for i in range(tiles):
                    start = begin + visited(i, before, full, tiles, ORDERED) * BLOCK_M
                    if loaded >= STAGES:
                        sync(FREE + stage, BOTH_AND_WARP)
                    mbarrier.expect(q_ready.index(stage), q.block_type.nbytes + stats.block_type.nbytes)
                    async_load(q, [batch, head, start, 0], q_ready.index(stage), q_smem.index(stage))
                    async_load(stats, [0, plane, start], q_ready.index(stage), stats_smem.index(2 * stage))
                    mbarrier.expect(dout_ready.index(stage), dout.block_type.nbytes + stats.block_type.nbytes)
                    async_load(dout, [batch, head, start, 0], dout_ready.index(stage), dout_smem.index(stage))
                    async_load(stats, [1, plane, start], dout_ready.index(stage), stats_smem.index(2 * stage + 1))
                    loaded += 1
                    stage, _ = advance(stage, 0, STAGES)
        program = next_job(counter, issued * programs)
    mbarrier.wait(job_free.index(slot), slot_phase)
    post(jobs, slot, (0, 0, 0, 0, 0, 0, 0))
    mbarrier.arrive(job_ready.index(slot))
    leave(counter, programs)


@gluon.jit
def seen_by(first, block_ends, layout: gl.constexpr):
    """The interval of queries that see each of the ROWS keys from ``first`` on: where it begins, and its length."""
    col_lo, col_hi, keys, _ = block_ends
    columns = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    lo = gl.load(col_lo + columns, mask=columns < keys, other=0)
    return lo, gl.load(col_hi + columns, mask=columns < keys, other=0) - lo


@gluon.jit
def following(i, plane, tiles, GROUP: gl.constexpr):
    """The visit after the ``i``-th to the head ``plane``: the heads of a group follow one another."""
    i += 1
    if GROUP > 1:
        plane = gl.where(i == tiles, plane + 1, plane)
        i = gl.where(i == tiles, 0, i)
    return i, plane


@gluon.jit
def is_masked(i, before, full, tiles, ORDERED: gl.constexpr):
    """Whether the tile that is visited as ``i``-th is not inside all intervals."""
    if ORDERED:
        n = visited(i, before, full, tiles, True)
        return (n < before) | (n >= before + full)
    else:
        return i < tiles - full


@gluon.jit
def place_of(i, plane, job, queries, BLOCK_M: gl.constexpr, ORDERED: gl.constexpr = False):
    """Where the tile that is visited as ``i``-th for the head ``plane`` lies among the sums of dQ."""
    begin, before, full, tiles = job
    return plane * gl.cdiv(queries, BLOCK_M) + begin // BLOCK_M + visited(i, before, full, tiles, ORDERED)


@gluon.jit
def probabilities(s, lse2, start, lo, length, scale, softcap, layout: gl.constexpr, SOFTCAP: gl.constexpr, masked):
    """From raw products the softmax, and the same times the derivative of the score by the scaled product."""
    if SOFTCAP:
        t = tanh(s * (scale / softcap))
        p = gl.exp2(t * (softcap * LOG2E) - lse2[None, :])
    else:
        p = gl.exp2(s * (scale * LOG2E) - lse2[None, :])
    if masked:  # a value of the loop: a tile inside every interval skips this
        p = gl.where(inside(lo - start, length, s.shape[1], layout), p, 0.0)
    sloped = p
    if SOFTCAP:
        sloped = p * (1.0 - t * t)
    return p, sloped


@gluon.jit
def store(out, tile, batch, kv_head, first, column, keys, kv_heads, DIM: gl.constexpr):
    """Write a tile into ``[B, K, G, DIM]``, from a column on."""
    rows = first + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, tile.type.layout))
    columns = column + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, tile.type.layout))
    at = ((batch.to(gl.int64) * keys + rows) * kv_heads + kv_head)[:, None] * DIM + columns[None, :]
    gl.store(out + at, tile.to(out.dtype.element_ty), mask=(rows < keys)[:, None] & (columns < DIM)[None, :])
