"""The backward kernel for Hopper: dK, dV and dQ in one pass, five products a tile.

After FlashAttention-3 (https://arxiv.org/abs/2407.08608): a block of 128 keys stays in place and queries pass by. Each of two
warpgroups holds 64 of the keys, with their dK and dV in registers. S and dP are computed transposed, so that P^T and
dS^T feed the products for dV and dK from registers. dS also goes through shared memory, where both warpgroups need all of
it: each computes half of the tile's dQ, which another warp adds to float32 sums in global memory.

[Note: shapes] as in `common`. ``stats`` is float32 ``[2, B * H, T]``: the log-sum-exp in base 2, and delta; see the portable
kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distflash.kernels.hopper.common import LOG2E, ROWS, nth, pick, span, tanh
from distflash.kernels.hopper.compat import async_add, async_load, barrier, store_wait

BLOCK_N = gl.constexpr(128)


@gluon.jit
def block_of(program, col_lo, col_hi, keys, kv_heads, batches, heads_at_once, BLOCK_M: gl.constexpr):
    """First key, batch and key head of a program, and the tiles of queries it visits."""
    blocks = gl.cdiv(keys, BLOCK_N)
    block, plane = pick(program, blocks, kv_heads * batches, heads_at_once)
    first = block * BLOCK_N  # under causal masks earlier keys are seen by more: longest first
    begin, before, full, tiles = span(col_lo, col_hi, first, gl.minimum(first + BLOCK_N, keys) - 1, BLOCK_M, 4)
    return first, plane // kv_heads, plane % kv_heads, begin, before, full, tiles


@gluon.jit
def load_tiles(
    q, k, v, dout, stats, smem, gates, job, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr
):
    """The loading warp: a block's keys and values, then the queries, their dout and statistics, tile by tile."""
    q_smem, k_smem, v_smem, dout_smem, stats_smem = smem
    kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free = gates
    col_lo, col_hi, keys, kv_heads, batches, heads_at_once, programs = job
    stage, phase, kv_phase = 0, 1, 1
    for program in range(gl.program_id(0), gl.cdiv(keys, BLOCK_N) * kv_heads * batches, programs):
        first, batch, kv_head, begin, before, full, tiles = block_of(
            program, col_lo, col_hi, keys, kv_heads, batches, heads_at_once, BLOCK_M
        )
        mbarrier.wait(kv_free, kv_phase)
        kv_phase ^= 1
        mbarrier.expect(kv_ready, 2 * k.block_type.nbytes + 2 * v.block_type.nbytes)
        for w in gl.static_range(2):
            async_load(k, [batch, kv_head, first + w * ROWS, 0], kv_ready, k_smem.index(w))
            async_load(v, [batch, kv_head, first + w * ROWS, 0], kv_ready, v_smem.index(w))
        for member in range(GROUP):
            head = kv_head * GROUP + member
            plane = batch * (kv_heads * GROUP) + head
            for i in range(tiles):
                start = begin + nth(i, before, full, tiles - full) * BLOCK_M
                mbarrier.wait(q_free.index(stage), phase)
                mbarrier.expect(q_ready.index(stage), q.block_type.nbytes + stats.block_type.nbytes)
                async_load(q, [batch, head, start, 0], q_ready.index(stage), q_smem.index(stage))
                async_load(stats, [0, plane, start], q_ready.index(stage), stats_smem.index(2 * stage))
                mbarrier.wait(dout_free.index(stage), phase)
                mbarrier.expect(dout_ready.index(stage), dout.block_type.nbytes + stats.block_type.nbytes)
                async_load(dout, [batch, head, start, 0], dout_ready.index(stage), dout_smem.index(stage))
                async_load(stats, [1, plane, start], dout_ready.index(stage), stats_smem.index(2 * stage + 1))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def add_queries(dq, dq_smem, dq_ready, dq_free, job, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """The adding warp: each tile's dQ, in the two parts that the warpgroups computed, to the sums in global memory."""
    col_lo, col_hi, keys, kv_heads, batches, heads_at_once, programs = job
    COLUMNS: gl.constexpr = 0 if BLOCK_M > ROWS else dq.block_type.shape[3]  # the second part is further down, or right
    phase = 0
    for program in range(gl.program_id(0), gl.cdiv(keys, BLOCK_N) * kv_heads * batches, programs):
        first, batch, kv_head, begin, before, full, tiles = block_of(
            program, col_lo, col_hi, keys, kv_heads, batches, heads_at_once, BLOCK_M
        )
        for member in range(GROUP):
            for i in range(tiles):
                start = begin + nth(i, before, full, tiles - full) * BLOCK_M
                for w in gl.static_range(2):
                    mbarrier.wait(dq_ready.index(w), phase)
                    row, column = start + w * (BLOCK_M - ROWS), w * COLUMNS
                    async_add(dq, [batch, kv_head * GROUP + member, row, column], dq_smem.index(w))
                store_wait(0)
                for w in gl.static_range(2):
                    mbarrier.arrive(dq_free.index(w))
                phase ^= 1


@gluon.jit
def probabilities(s, lse2, start, lo, hi, scale, softcap, layout: gl.constexpr, SOFTCAP: gl.constexpr, MASKED):
    """From raw products ``k.q`` the softmax, and the derivative of the score by the scaled product (1 but for softcap)."""
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
def attend(
    w: gl.constexpr, dk, dv, at, smem, exchange, gates, handover, start, lo, hi, scale, softcap, MASKED,
    BLOCK_M: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Add the tile of queries at ``start`` to dK and dV, and hand over this warpgroup's part of the tile's dQ."""
    stage, phase, turn, turn_phase = at
    q_smem, k_smem, v_smem, dout_smem, stats_smem = smem
    ds_smem, dq_smem = exchange
    kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free = gates
    ds_ready, ds_free, dq_ready, dq_free = handover
    DP: gl.constexpr = k_smem.shape[4]
    VP: gl.constexpr = v_smem.shape[4]
    dtype: gl.constexpr = q_smem.dtype
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    queries: gl.constexpr = gl.SliceLayout(0, mma_s)
    WIDTH: gl.constexpr = dq_smem.shape[4]
    mma_q: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    left_v: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, k_width=2)
    left_k: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, k_width=2)

    query = q_smem.index(stage).reshape([BLOCK_M, DP])
    gradient = dout_smem.index(stage).reshape([BLOCK_M, VP])
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=mma_s)
    mbarrier.wait(q_ready.index(stage), phase)
    s = warpgroup_mma(
        k_smem.index(w).reshape([ROWS, DP]), query.permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    mbarrier.wait(dout_ready.index(stage), phase)
    dp = warpgroup_mma(
        v_smem.index(w).reshape([ROWS, VP]), gradient.permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    lse2 = stats_smem.index(2 * stage).reshape([BLOCK_M]).load(queries)
    delta = stats_smem.index(2 * stage + 1).reshape([BLOCK_M]).load(queries)
    s = warpgroup_mma_wait(1, [s])
    p, slope = probabilities(s, lse2, start, lo, hi, scale, softcap, mma_s, SOFTCAP, MASKED)
    p16 = gl.convert_layout(p.to(dtype), left_v)
    dp = warpgroup_mma_wait(0, [dp])
    dv = warpgroup_mma(p16, gradient, dv, is_async=True)
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds = ds * slope
    ds16 = ds.to(dtype)
    mbarrier.wait(ds_free.index(turn), turn_phase ^ 1)
    ds_smem.index(2 * turn + w).store(ds16)
    fence_async_shared()
    mbarrier.arrive(ds_ready.index(turn))
    ds16 = gl.convert_layout(ds16, left_k)
    dk = warpgroup_mma(ds16, query, dk, is_async=True)
    mbarrier.wait(ds_ready.index(turn), turn_phase)
    dq = gl.zeros([ROWS, WIDTH], gl.float32, layout=mma_q)
    for n in gl.static_range(2):
        part = ds_smem.index(2 * turn + n)
        key = k_smem.index(n).reshape([ROWS, DP])
        if BLOCK_M > ROWS:
            dq = warpgroup_mma(part.slice(w * ROWS, ROWS, dim=1).permute((1, 0)), key, dq, use_acc=n > 0, is_async=True)
        else:
            dq = warpgroup_mma(
                part.permute((1, 0)), key.slice(w * WIDTH, WIDTH, dim=1), dq, use_acc=n > 0, is_async=True
            )
    dv, p16 = warpgroup_mma_wait(3, [dv, p16])
    mbarrier.arrive(dout_free.index(stage))
    dk, ds16 = warpgroup_mma_wait(2, [dk, ds16])
    mbarrier.arrive(q_free.index(stage))
    dq = warpgroup_mma_wait(0, [dq])
    mbarrier.arrive(ds_free.index(turn))
    return dk, dv, dq


@gluon.jit
def consume(
    w: gl.constexpr, smem, exchange, gates, handover, job, outputs, scale, softcap,
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``w``: dK and dV of 64 keys of every block."""
    q_smem, k_smem, v_smem, dout_smem, stats_smem = smem
    ds_smem, dq_smem = exchange
    kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free = gates
    ds_ready, ds_free, dq_ready, dq_free = handover
    col_lo, col_hi, keys, kv_heads, batches, heads_at_once, programs = job
    dk_out, dv_out = outputs
    DP: gl.constexpr = k_smem.shape[4]
    VP: gl.constexpr = v_smem.shape[4]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    mma_k: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DP, 16])
    mma_v: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VP, 16])
    stage, phase, turn, turn_phase, kv_phase, dq_phase = 0, 0, 0, 0, 0, 1
    for program in range(gl.program_id(0), gl.cdiv(keys, BLOCK_N) * kv_heads * batches, programs):
        block, batch, kv_head, begin, before, full, tiles = block_of(
            program, col_lo, col_hi, keys, kv_heads, batches, heads_at_once, BLOCK_M
        )
        first = block + w * ROWS
        columns = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_s))
        lo = gl.load(col_lo + columns, mask=columns < keys, other=0)
        hi = gl.load(col_hi + columns, mask=columns < keys, other=0)
        dk = gl.zeros([ROWS, DP], gl.float32, layout=mma_k)
        dv = gl.zeros([ROWS, VP], gl.float32, layout=mma_v)
        mbarrier.wait(kv_ready, kv_phase)
        kv_phase ^= 1
        for member in range(GROUP):
            for i in range(tiles):
                start = begin + nth(i, before, full, tiles - full) * BLOCK_M
                dk, dv, dq = attend(
                    w, dk, dv, (stage, phase, turn, turn_phase), smem, exchange, gates, handover,
                    start, lo, hi, scale, softcap, i < tiles - full, BLOCK_M, SOFTCAP,
                )  # fmt: skip
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
                turn_phase ^= turn
                turn ^= 1
                mbarrier.wait(dq_free.index(w), dq_phase)
                dq_phase ^= 1
                dq_smem.index(w).reshape([ROWS, dq_smem.shape[4]]).store(dq)
                fence_async_shared()
                mbarrier.arrive(dq_ready.index(w))
        mbarrier.arrive(kv_free)
        store(dv_out, dv, batch, kv_head, first, keys, kv_heads, V)
        store(dk_out, dk * scale, batch, kv_head, first, keys, kv_heads, D)


@gluon.jit
def store(out, tile, batch, kv_head, first, keys, kv_heads, DIM: gl.constexpr):
    """Round a tile into ``[B, K, G, DIM]``."""
    rows = first + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, tile.type.layout))
    columns = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, tile.type.layout))
    at = ((batch.to(gl.int64) * keys + rows) * kv_heads + kv_head)[:, None] * DIM + columns[None, :]
    gl.store(out + at, tile.to(out.dtype.element_ty), mask=(rows < keys)[:, None] & (columns < DIM)[None, :])


@gluon.jit(do_not_specialize=["dk", "dv", "keys", "batches", "heads_at_once", "programs"])
def backward_kernel(
    q, k, v, dout,  # descriptors of [B, H, T, D], [B, G, K, D], [B, G, K, V], [B, H, T, V]
    stats,  # descriptor of float32 [2, B * H, T]
    col_lo, col_hi,  # int32 [K]
    dq,  # descriptor of float32 [B, H, T, D], added to
    dk, dv,  # [B, K, G, D], [B, K, G, V]
    scale, softcap, keys, kv_heads, batches, heads_at_once, programs,
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], q.dtype)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    dout_smem = gl.allocate_shared_memory(q.dtype, [STAGES] + dout.block_type.shape, dout.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES] + stats.block_type.shape, stats.layout)
    k_smem = gl.allocate_shared_memory(q.dtype, [2] + k.block_type.shape, k.layout)
    v_smem = gl.allocate_shared_memory(q.dtype, [2] + v.block_type.shape, v.layout)
    ds_smem = gl.allocate_shared_memory(q.dtype, [4, ROWS, BLOCK_M], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2] + dq.block_type.shape, dq.layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], one)
    kv_free = gl.allocate_shared_memory(gl.int64, [1], one)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    dout_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    dout_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    ds_ready = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    ds_free = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    dq_ready = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    dq_free = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    mbarrier.init(kv_ready, count=1)
    mbarrier.init(kv_free, count=2)
    for n in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(dout_ready.index(n), count=1)
        mbarrier.init(q_free.index(n), count=2)
        mbarrier.init(dout_free.index(n), count=2)
    for n in gl.static_range(2):
        mbarrier.init(ds_ready.index(n), count=2)
        mbarrier.init(ds_free.index(n), count=2)
        mbarrier.init(dq_ready.index(n), count=1)
        mbarrier.init(dq_free.index(n), count=1)
    fence_async_shared()

    smem = (q_smem, k_smem, v_smem, dout_smem, stats_smem)
    exchange = (ds_smem, dq_smem)
    gates = (kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free)
    handover = (ds_ready, ds_free, dq_ready, dq_free)
    job = (col_lo, col_hi, keys, kv_heads, batches, heads_at_once, programs)
    outputs = (dk, dv)
    gl.warp_specialize(
        [
            (consume, (0, smem, exchange, gates, handover, job, outputs, scale, softcap, GROUP, D, V, BLOCK_M, STAGES, SOFTCAP)),
            (consume, (1, smem, exchange, gates, handover, job, outputs, scale, softcap, GROUP, D, V, BLOCK_M, STAGES, SOFTCAP)),
            (load_tiles, (q, k, v, dout, stats, smem, gates, job, GROUP, BLOCK_M, STAGES)),
            (add_queries, (dq, dq_smem, dq_ready, dq_free, job, GROUP, BLOCK_M)),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )
