"""The backward kernel for Hopper: dK, dV and dQ in one pass, five products a tile.

After FlashAttention-3 (https://arxiv.org/abs/2407.08608): a block of 128 keys stays in place and queries pass by. Each
of two warpgroups holds 64 of the keys, with their dK and dV in registers. S and dP are computed transposed, so that
P^T and dS^T feed the products for dV and dK from registers. dS also goes through shared memory, where both warpgroups
need all of it: each computes half of the tile's dQ, which another warp adds to float32 sums in global memory.

[Note: shapes] as in `common`. ``stats`` is float32 ``[2, B * H, T]``: the log-sum-exp in base 2, and delta; see the
portable kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distflash.kernels.hopper.common import (
    LOG2E,
    ROWS,
    advance,
    arrive,
    leave,
    next_job,
    nth,
    pick,
    post,
    product,
    read,
    span,
    sync,
    tanh,
)
from distflash.kernels.hopper.compat import async_add, async_load, async_store, barrier, store_wait

BLOCK_N = gl.constexpr(128)
JOB = gl.constexpr(7)  # first, batch, kv_head, begin, before, full, tiles
# Hardware barriers, beyond those that the compiler uses; one a warpgroup or a stage.
DS_READY = gl.constexpr(5)
DQ_READY = gl.constexpr(7)
DQ_FREE = gl.constexpr(9)
Q_FREE = gl.constexpr(11)
DOUT_FREE = gl.constexpr(13)
DONE = gl.constexpr(15)
MAX_STAGES = gl.constexpr(2)
BOTH = gl.constexpr(256)  # threads of both warpgroups
BOTH_AND_WARP = gl.constexpr(288)
ONE_AND_WARP = gl.constexpr(160)


@gluon.jit
def load_tiles(
    q, k, v, dout, stats, smem, gates, jobs, counter, block_ends, batches, heads_at_once, programs,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: a block's keys and values, then the queries, their dout and statistics, tile by tile."""
    q_smem, k_smem, v_smem, dout_smem, stats_smem = smem
    kv_ready, kv_free, job_ready, job_free, q_ready, dout_ready = gates
    col_lo, col_hi, keys, kv_heads = block_ends
    blocks = gl.cdiv(keys, BLOCK_N)
    slot, slot_phase, kv_phase, stage, loaded = 0, 1, 1, 0, 0
    program = gl.program_id(0)
    while program < blocks * kv_heads * batches:
        block, key_plane = pick(program, blocks, kv_heads * batches, heads_at_once)
        first = block * BLOCK_N  # under causal masks earlier keys are seen by more: longest first
        begin, before, full, tiles = span(col_lo, col_hi, first, gl.minimum(first + BLOCK_N, keys) - 1, BLOCK_M, 4)
        batch, kv_head = key_plane // kv_heads, key_plane % kv_heads
        mbarrier.wait(job_free.index(slot), slot_phase)
        post(jobs, slot, (first, batch, kv_head, begin, before, full, tiles))
        mbarrier.arrive(job_ready.index(slot))
        slot, slot_phase = advance(slot, slot_phase, 2)
        mbarrier.wait(kv_free, kv_phase)
        kv_phase ^= 1
        mbarrier.expect(kv_ready, 2 * k.block_type.nbytes + 2 * v.block_type.nbytes)
        for w in gl.static_range(2):
            async_load(k, [batch, kv_head, first + w * ROWS, 0], kv_ready, k_smem.index(w))
            async_load(v, [batch, kv_head, first + w * ROWS, 0], kv_ready, v_smem.index(w))
        for member in range(GROUP):
            head = kv_head * GROUP + member
            plane = key_plane * GROUP + member
            for i in range(tiles):
                start = begin + nth(i, before, full, tiles - full) * BLOCK_M
                if loaded >= STAGES:
                    sync(Q_FREE + stage, BOTH_AND_WARP)
                mbarrier.expect(q_ready.index(stage), q.block_type.nbytes + stats.block_type.nbytes)
                async_load(q, [batch, head, start, 0], q_ready.index(stage), q_smem.index(stage))
                async_load(stats, [0, plane, start], q_ready.index(stage), stats_smem.index(2 * stage))
                if loaded >= STAGES:
                    sync(DOUT_FREE + stage, BOTH_AND_WARP)
                mbarrier.expect(dout_ready.index(stage), dout.block_type.nbytes + stats.block_type.nbytes)
                async_load(dout, [batch, head, start, 0], dout_ready.index(stage), dout_smem.index(stage))
                async_load(stats, [1, plane, start], dout_ready.index(stage), stats_smem.index(2 * stage + 1))
                loaded += 1
                stage, _ = advance(stage, 0, STAGES)
        program = next_job(counter, programs)
    mbarrier.wait(job_free.index(slot), slot_phase)
    post(jobs, slot, (0, 0, 0, 0, 0, 0, 0))
    mbarrier.arrive(job_ready.index(slot))
    leave(counter, programs)


@gluon.jit
def add_queries(dq, dq_smem, jobs, job_ready, job_free, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """The adding warp: each tile's dQ, in the two parts that the warpgroups computed, to the sums in global memory."""
    COLUMNS: gl.constexpr = dq.block_type.shape[3]
    for w in gl.static_range(2):
        arrive(DQ_FREE + w, ONE_AND_WARP)
    slot, slot_phase = 0, 0
    mbarrier.wait(job_ready.index(slot), slot_phase)
    _, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB)
    while tiles > 0:
        for member in range(GROUP):
            for i in range(tiles):
                start = begin + nth(i, before, full, tiles - full) * BLOCK_M
                for w in gl.static_range(2):
                    sync(DQ_READY + w, ONE_AND_WARP)
                    async_add(dq, [batch, kv_head * GROUP + member, start, w * COLUMNS], dq_smem.index(w))
                store_wait(0)
                for w in gl.static_range(2):
                    arrive(DQ_FREE + w, ONE_AND_WARP)
        mbarrier.arrive(job_free.index(slot))
        slot, slot_phase = advance(slot, slot_phase, 2)
        mbarrier.wait(job_ready.index(slot), slot_phase)
        _, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB)


@gluon.jit
def probabilities(s, lse2, start, lo, hi, scale, softcap, layout: gl.constexpr, SOFTCAP: gl.constexpr, MASKED):
    """From raw products the softmax, and the derivative of the score by the scaled product (1 but for softcap)."""
    slope = 1.0
    if SOFTCAP:
        t = tanh(s * (scale / softcap))
        slope = 1.0 - t * t
        p = gl.exp2(t * (softcap * LOG2E) - lse2[None, :])
    else:
        p = gl.exp2(s * (scale * LOG2E) - lse2[None, :])
    if MASKED:  # a value of the loop: a tile inside every interval skips this
        queries = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
        p = gl.where((queries >= (lo - start)[:, None]) & (queries < (hi - start)[:, None]), p, 0.0)
    return p, slope


@gluon.jit
def query_part(w: gl.constexpr, ds_smem, k_smem, turn, WIDTH: gl.constexpr):
    """Start this warpgroup's part of a tile's dQ = dS K, over all keys of the block: half of the columns."""
    dq = gl.zeros([ROWS, WIDTH], gl.float32, layout=product(WIDTH))
    for n in gl.static_range(2):
        part = ds_smem.index(2 * turn + n)
        key = k_smem.index(n).reshape([ROWS, k_smem.shape[4]]).slice(w * WIDTH, WIDTH, dim=1)
        dq = warpgroup_mma(part.permute((1, 0)), key, dq, use_acc=n > 0, is_async=True)
    return dq


@gluon.jit
def hand_over(w: gl.constexpr, dq, dq_smem):
    """Give this warpgroup's part of a tile's dQ to the adding warp."""
    sync(DQ_FREE + w, ONE_AND_WARP)
    dq_smem.index(w).reshape(dq.shape).store(dq)
    fence_async_shared()
    arrive(DQ_READY + w, ONE_AND_WARP)


@gluon.jit
def attend(
    w: gl.constexpr, dk, dv, s, key, value, stage, phase, following, following_phase, more, turn,
    smem, exchange, gates, start, lo, hi, scale, softcap, MASKED, BLOCK_M: gl.constexpr, SOFTCAP: gl.constexpr,
    IN_REGISTERS: gl.constexpr, PREFETCH: gl.constexpr,
):  # fmt: skip
    """Add the tile of queries at ``start`` to dK and dV, and hand over this warpgroup's part of the tile's dQ.

    If PREFETCH, it is given the tile's S, and returns the next tile's, so that the tensor cores are busy while dQ is
    handed over; after a block's last tile, that of whatever lies there, which nobody looks at.
    """
    q_smem, k_smem, v_smem, dout_smem, stats_smem = smem
    ds_smem, dq_smem = exchange
    _, _, _, _, q_ready, dout_ready = gates
    DP: gl.constexpr = k_smem.shape[4]
    VP: gl.constexpr = v_smem.shape[4]
    dtype: gl.constexpr = q_smem.dtype
    mma_s: gl.constexpr = product(BLOCK_M)
    if not IN_REGISTERS:
        key = k_smem.index(w).reshape([ROWS, DP])
        value = v_smem.index(w).reshape([ROWS, VP])
    gradient = dout_smem.index(stage).reshape([BLOCK_M, VP])
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=mma_s)

    query = q_smem.index(stage).reshape([BLOCK_M, DP])
    if not PREFETCH:
        mbarrier.wait(q_ready.index(stage), phase)
        s = warpgroup_mma(key, query.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(dout_ready.index(stage), phase)
    dp = warpgroup_mma(value, gradient.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse2 = stats_smem.index(2 * stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, mma_s))
    if not PREFETCH:
        s = warpgroup_mma_wait(1, [s])
    p, slope = probabilities(s, lse2, start, lo, hi, scale, softcap, mma_s, SOFTCAP, MASKED)
    delta = stats_smem.index(2 * stage + 1).reshape([BLOCK_M]).load(gl.SliceLayout(0, mma_s))
    p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, dv.type.layout, k_width=2))
    dp = warpgroup_mma_wait(0, [dp])
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds = ds * slope
    ds16 = ds.to(dtype)
    # Free since both warpgroups last met: then, the products of the tile before this one's had been waited for.
    ds_smem.index(2 * turn + w).store(ds16)
    fence_async_shared()
    arrive(DS_READY + 1 - w, BOTH)
    dv = warpgroup_mma(p16, gradient, dv, is_async=True)
    sync(DS_READY + w, BOTH)
    dq = query_part(w, ds_smem, k_smem, turn, dq_smem.shape[4])
    dv, p16 = warpgroup_mma_wait(2, [dv, p16])
    arrive(DOUT_FREE + stage, BOTH_AND_WARP)
    ds16 = gl.convert_layout(ds16, gl.DotOperandLayout(0, dk.type.layout, k_width=2))
    dk = warpgroup_mma(ds16, query, dk, is_async=True)
    if PREFETCH:
        mbarrier.wait(q_ready.index(following), following_phase, pred=more)
        query = q_smem.index(following).reshape([BLOCK_M, DP])
        s = warpgroup_mma(key, query.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dq = warpgroup_mma_wait(1 + PREFETCH, [dq])
    hand_over(w, dq, dq_smem)
    dk, ds16 = warpgroup_mma_wait(0 + PREFETCH, [dk, ds16])
    arrive(Q_FREE + stage, BOTH_AND_WARP)
    if PREFETCH:
        s = warpgroup_mma_wait(0, [s])
    return dk, dv, s


@gluon.jit
def leave_block(
    w: gl.constexpr, dk, dv, dk_out, dv_out, smem, kv_free, batch, kv_head, first, keys, kv_heads,
    D: gl.constexpr, V: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Write a block's dK and dV, and free the places of its keys and values."""
    q_smem, k_smem, v_smem, _, _ = smem
    if WIDE:
        mbarrier.arrive(kv_free)
        store(dv_out, dv, batch, kv_head, first, keys, kv_heads, V)
        store(dk_out, dk, batch, kv_head, first, keys, kv_heads, D)
    else:  # leave by those places, which are as large
        value = v_smem.index(w)
        value.reshape(dv.shape).store(dv.to(q_smem.dtype))
        sync(DONE, BOTH)  # the other warpgroup reads these keys, too
        key = k_smem.index(w)
        key.reshape(dk.shape).store(dk.to(q_smem.dtype))
        fence_async_shared()
        barrier()
        async_store(dv_out, [batch, kv_head, first, 0], value)
        async_store(dk_out, [batch, kv_head, first, 0], key)
        store_wait(0)
        mbarrier.arrive(kv_free)


@gluon.jit
def consume(
    w: gl.constexpr, smem, exchange, gates, jobs, block_ends, dk_out, dv_out, scale, softcap,
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr, IN_REGISTERS: gl.constexpr, PREFETCH: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``w``: dK and dV of 64 keys of every block."""
    kv_ready, kv_free, job_ready, job_free, q_ready, _ = gates
    col_lo, col_hi, keys, kv_heads = block_ends
    DP: gl.constexpr = smem[1].shape[4]
    VP: gl.constexpr = smem[2].shape[4]
    mma_s: gl.constexpr = product(BLOCK_M)
    mma_k: gl.constexpr = product(DP)
    mma_v: gl.constexpr = product(VP)
    stage, phase, turn, kv_phase, slot, slot_phase = 0, 0, 0, 0, 0, 0
    mbarrier.wait(job_ready.index(slot), slot_phase)
    first, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB)
    while tiles > 0:
        first += w * ROWS
        columns = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_s))
        lo = gl.load(col_lo + columns, mask=columns < keys, other=0)
        hi = gl.load(col_hi + columns, mask=columns < keys, other=0)
        dk = gl.zeros([ROWS, DP], gl.float32, layout=mma_k)
        dv = gl.zeros([ROWS, VP], gl.float32, layout=mma_v)
        mbarrier.wait(kv_ready, kv_phase)
        kv_phase ^= 1
        key = smem[1].index(w).reshape([ROWS, DP])
        value = smem[2].index(w).reshape([ROWS, VP])
        if IN_REGISTERS:
            key = key.load(gl.DotOperandLayout(0, mma_s, k_width=2))
            value = value.load(gl.DotOperandLayout(0, mma_s, k_width=2))
        s = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=mma_s)
        if PREFETCH:
            mbarrier.wait(q_ready.index(stage), phase)
            query = smem[0].index(stage).reshape([BLOCK_M, DP])
            s = warpgroup_mma(key, query.permute((1, 0)), s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, [s])
        for member in range(GROUP):
            for i in range(tiles):
                following, following_phase = advance(stage, phase, STAGES)
                start = begin + nth(i, before, full, tiles - full) * BLOCK_M
                more = (i + 1 < tiles) | (member + 1 < GROUP)
                dk, dv, s = attend(
                    w, dk, dv, s, key, value, stage, phase, following, following_phase, more, turn,
                    smem, exchange, gates, start, lo, hi, scale, softcap, i < tiles - full,
                    BLOCK_M, SOFTCAP, IN_REGISTERS, PREFETCH,
                )  # fmt: skip
                turn ^= 1
                stage = following
                phase = following_phase
        leave_block(w, dk * scale, dv, dk_out, dv_out, smem, kv_free, batch, kv_head, first, keys, kv_heads, D, V, WIDE)
        mbarrier.arrive(job_free.index(slot))
        slot, slot_phase = advance(slot, slot_phase, 2)
        mbarrier.wait(job_ready.index(slot), slot_phase)
        first, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB)


@gluon.jit
def store(out, tile, batch, kv_head, first, keys, kv_heads, DIM: gl.constexpr):
    """Write a tile into ``[B, K, G, DIM]``."""
    rows = first + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, tile.type.layout))
    columns = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, tile.type.layout))
    at = ((batch.to(gl.int64) * keys + rows) * kv_heads + kv_head)[:, None] * DIM + columns[None, :]
    gl.store(out + at, tile, mask=(rows < keys)[:, None] & (columns < DIM)[None, :])


@gluon.jit(do_not_specialize=["dk", "dv", "keys", "batches", "heads_at_once", "programs"])
def backward_kernel(
    q, k, v, dout,  # descriptors of [B, H, T, D], [B, G, K, D], [B, G, K, V], [B, H, T, V]
    stats,  # descriptor of float32 [2, B * H, T]
    col_lo, col_hi,  # int32 [K]
    dq,  # descriptor of float32 [B, H, T, D], added to
    dk, dv,  # float32 [B, K, G, D], [B, K, G, V] if WIDE, else descriptors of [B, G, K, D], [B, G, K, V] in q's dtype
    counter,  # int32 [2], zeros, and zeros again afterwards
    scale, softcap, keys, kv_heads, batches, heads_at_once, programs,
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, IN_REGISTERS: gl.constexpr, PREFETCH: gl.constexpr, WIDE: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES <= MAX_STAGES)
    gl.static_assert(BLOCK_M == ROWS)  # a part of dQ is a product of 64 rows
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], q.dtype)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    dout_smem = gl.allocate_shared_memory(q.dtype, [STAGES] + dout.block_type.shape, dout.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES] + stats.block_type.shape, stats.layout)
    k_smem = gl.allocate_shared_memory(q.dtype, [2] + k.block_type.shape, k.layout)
    v_smem = gl.allocate_shared_memory(q.dtype, [2] + v.block_type.shape, v.layout)
    ds_smem = gl.allocate_shared_memory(q.dtype, [4, ROWS, BLOCK_M], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2] + dq.block_type.shape, dq.layout)
    jobs = gl.allocate_shared_memory(gl.int32, [2 * JOB, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
        mbarrier.init(job_free.index(n), count=3)
    for n in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(dout_ready.index(n), count=1)
    fence_async_shared()

    smem = (q_smem, k_smem, v_smem, dout_smem, stats_smem)
    exchange = (ds_smem, dq_smem)
    gates = (kv_ready, kv_free, job_ready, job_free, q_ready, dout_ready)
    block_ends = (col_lo, col_hi, keys, kv_heads)
    gl.warp_specialize([
        (consume, (
            0, smem, exchange, gates, jobs, block_ends, dk, dv, scale, softcap,
            GROUP, D, V, BLOCK_M, STAGES, SOFTCAP, IN_REGISTERS, PREFETCH, WIDE,
        )),
        (consume, (
            1, smem, exchange, gates, jobs, block_ends, dk, dv, scale, softcap,
            GROUP, D, V, BLOCK_M, STAGES, SOFTCAP, IN_REGISTERS, PREFETCH, WIDE,
        )),
        (load_tiles, (
            q, k, v, dout, stats, smem, gates, jobs, counter, block_ends, batches, heads_at_once, programs,
            GROUP, BLOCK_M, STAGES,
        )),
        (add_queries, (dq, dq_smem, jobs, job_ready, job_free, GROUP, BLOCK_M)),
    ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip
