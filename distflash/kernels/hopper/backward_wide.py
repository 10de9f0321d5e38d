"""The backward kernel for Hopper above a head dim of 128, where dK and dV of 64 keys fill two warpgroups' registers.

A work tile is 64 keys: one warpgroup accumulates their dK, the other their dV, and each computes some columns of every
block's dQ. Both need P and dS of all queries of a block, and each computes half of them, so they exchange them through
shared memory. The second warpgroup waits for P only, which is ready long before dS, so it can run ahead. As in
`backward`, dQ of a block is computed one block later and overlaps the next softmax; the warpgroup itself adds it.

[Note: shapes] as in `backward_parts`. HALF queries of a tile are a warpgroup's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distflash.kernels.hopper.backward_parts import (
    BOTH,
    BOTH_AND_WARP,
    DS_READY,
    FREE,
    JOB,
    MAX_STAGES,
    following,
    load_tiles,
    make_gates,
    place_of,
    probabilities,
    seen_by,
    store,
)
from distflash.kernels.hopper.common import (
    ROWS,
    advance,
    arrive,
    column_chunks,
    columns_of,
    nth,
    product_layout,
    read,
    row_products,
    sync,
)
from distflash.kernels.hopper.dropout import keys_at, rounded, score_gradient, thinned
from distflash.kernels.hopper.fragments import add

P_READY = gl.constexpr(9)  # a hardware barrier beside those of `backward_parts`: of two tiles in turn
HALF = gl.constexpr(32)  # queries of a tile whose scores are one warpgroup's


@gluon.constexpr_function
def query_parts(w, d_qk, d_v):
    """The first of the blocks of 64 columns of dQ that are warpgroup ``w``'s, and how many.

    The first warpgroup has dK and the second dV, of which the columns are often fewer: so it has the more of dQ.
    """
    count, some = columns_of(d_qk) // 64, columns_of(d_v) // 128
    return (count - some, some) if w == 0 else (0, count - some)


@gluon.constexpr_function
def at_once(w, d_qk, d_v):
    """How many of these there are registers for beside a gradient: the rest is a product of its own."""
    sums = (d_qk if w == 0 else d_v) > 192
    return 1 if sums else min(2, query_parts(w, d_qk, d_v)[1])


@gluon.jit
def query_product(part: gl.constexpr, parts: gl.constexpr, ds, key):
    """Start so many blocks of columns of a tile's dQ = dS K."""
    dq = gl.zeros([ROWS, 64 * parts], gl.float32, layout=product_layout(64 * parts))
    return warpgroup_mma(ds, key.slice(64 * part, 64 * parts, dim=1), dq, use_acc=False, is_async=True)


@gluon.jit
def add_product(part: gl.constexpr, dq, sums, place, D: gl.constexpr):
    add(sums + (place.to(gl.int64) * gl.cdiv(D, 64) + part) * (ROWS * 64), dq)


@gluon.jit
def no_gradient(DIM: gl.constexpr):
    """Zeros for dK or dV of a block, in column chunks."""
    if columns_of(DIM) == 192:
        left = gl.zeros([ROWS, 128], gl.float32, product_layout(128))
        return left, gl.zeros([ROWS, 64], gl.float32, product_layout(64))
    else:
        return (gl.zeros([ROWS, columns_of(DIM)], gl.float32, product_layout(columns_of(DIM))),)


@gluon.jit
def accumulate(gradient, side, rows, DIM: gl.constexpr):
    """Start ``gradient += side^T rows``, over all queries of a tile."""
    parts = column_chunks(rows, columns_of(DIM))
    side = side.permute((1, 0))
    if len(gradient) == 2:
        first = warpgroup_mma(side, parts[0], gradient[0], is_async=True)
        return first, warpgroup_mma(side, parts[1], gradient[1], is_async=True)
    else:
        return (warpgroup_mma(side, parts[0], gradient[0], is_async=True),)


@gluon.jit
def wait_for(gradient):
    if len(gradient) == 2:
        first, second = warpgroup_mma_wait(0, [gradient[0], gradient[1]])
        return first, second
    else:
        return (warpgroup_mma_wait(0, [gradient[0]]),)


@gluon.jit
def attend(
    w: gl.constexpr, gradient, value, stage, phase, turn,
    smem, exchange, gates, sums, place, start, masked, lo, length, scale, softcap, k_at, plane, dropping,
    D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, SOFTCAP: gl.constexpr, IN_REGISTERS: gl.constexpr,
    FIRST: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Add the tile of queries at ``start`` to a gradient, and leave its dS for dQ.

    Unless it is a block's FIRST, the tile before it, whose place among the sums is ``place``, gets its dQ meanwhile.
    """
    q_smem, k_smem, v_smem, dout_smem, stats_smem = smem
    p_smem, ds_smem = exchange
    q_ready, dout_ready = gates[4], gates[5]
    PART: gl.constexpr = query_parts(w, D, V)[0]
    EARLY: gl.constexpr = at_once(w, D, V)
    REST: gl.constexpr = query_parts(w, D, V)[1] - EARLY
    mma_s: gl.constexpr = product_layout(HALF)
    # 0, but not to the compiler, which would form their descriptors once for all tiles, and have to spill them.
    zero = stage >> 1
    key = k_smem.index(zero).reshape([ROWS, k_smem.shape[4]])
    if not IN_REGISTERS:
        value = column_chunks(v_smem.index(zero).reshape([ROWS, v_smem.shape[4]]), columns_of(V))
    query = q_smem.index(stage).reshape([BLOCK_M, k_smem.shape[4]])
    dout = dout_smem.index(stage).reshape([BLOCK_M, v_smem.shape[4]])
    zeros = gl.zeros([ROWS, HALF], gl.float32, layout=mma_s)

    mbarrier.wait(q_ready.index(stage), phase)
    s = row_products(column_chunks(key, columns_of(D)), query.slice(w * HALF, HALF), zeros)
    mbarrier.wait(dout_ready.index(stage), phase)
    dp = row_products(value, dout.slice(w * HALF, HALF), zeros)
    if not FIRST:
        if w == 1:  # the other has waited already
            sync(DS_READY + 2 * (turn ^ 1) + w, BOTH)
        dq = query_product(PART, EARLY, ds_smem.index(turn ^ 1), key)
    lse2 = stats_smem.index(2 * stage).reshape([BLOCK_M]).slice(w * HALF, HALF).load(gl.SliceLayout(0, mma_s))
    delta = stats_smem.index(2 * stage + 1).reshape([BLOCK_M]).slice(w * HALF, HALF).load(gl.SliceLayout(0, mma_s))
    s = warpgroup_mma_wait(len(value) if FIRST else len(value) + 1, [s])
    p, sloped = probabilities(s, lse2, start + w * HALF, lo, length, scale, softcap, mma_s, SOFTCAP, masked)
    p, sloped = thinned(p, sloped, start + w * HALF, k_at, plane, dropping, DROPOUT)
    p_smem.index(turn).slice(w * HALF, HALF).store(rounded(p, q_smem, DROPOUT).permute((1, 0)))
    if w == 0:
        fence_async_shared()
        arrive(P_READY + turn, BOTH)
    if FIRST:
        dp = warpgroup_mma_wait(0, [dp])
    else:
        dp, dq = warpgroup_mma_wait(0, [dp, dq])
        if REST > 0:
            rest = query_product(PART + EARLY, REST, ds_smem.index(turn ^ 1), key)
        add_product(PART, dq, sums, place, D)
    ds = score_gradient(sloped, dp, delta, dropping, DROPOUT)
    ds_smem.index(turn).slice(w * HALF, HALF).store(ds.to(q_smem.dtype).permute((1, 0)))
    if not FIRST and REST > 0:  # before the other warpgroup can be a tile ahead, and write where this reads
        rest = warpgroup_mma_wait(0, [rest])
    fence_async_shared()
    arrive(DS_READY + 2 * turn + 1 - w, BOTH)
    if w == 0:
        sync(DS_READY + 2 * turn + w, BOTH)
        gradient = accumulate(gradient, ds_smem.index(turn), query, D)
    else:
        sync(P_READY + turn, BOTH)
        gradient = accumulate(gradient, p_smem.index(turn), dout, V)
    if not FIRST and REST > 0:
        add_product(PART + EARLY, rest, sums, place, D)
    gradient = wait_for(gradient)
    arrive(FREE + stage, BOTH_AND_WARP)
    return gradient


@gluon.jit
def leave_block(
    w: gl.constexpr, gradient, stage, turn, smem, exchange, gates, sums, place, scale, dk_out, dv_out,
    batch, kv_head, first, keys, kv_heads, keep_scale, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr,
    DROPOUT: gl.constexpr,
):  # fmt: skip
    """A block's last tile gets its dQ, too; then write dK or dV."""
    PART: gl.constexpr = query_parts(w, D, V)[0]
    PARTS: gl.constexpr = query_parts(w, D, V)[1]
    key = smem[1].index(0).reshape([ROWS, smem[1].shape[4]])
    if w == 1:
        sync(DS_READY + 2 * turn + w, BOTH)
    for n in gl.static_range(PARTS):
        dq = query_product(PART + n, 1, exchange[1].index(turn), key)
        add_product(PART + n, warpgroup_mma_wait(0, [dq]), sums, place, D)
    mbarrier.arrive(gates[1])
    if DROPOUT == 0:
        keep_scale = 1.0
    for n in gl.static_range(len(gradient)):
        if w == 0:
            store(dk_out, gradient[n] * (scale * keep_scale), batch, kv_head, first, n * 128, keys, kv_heads, D)
        else:
            store(dv_out, gradient[n] * keep_scale, batch, kv_head, first, n * 128, keys, kv_heads, V)


@gluon.jit
def consume(
    w: gl.constexpr, smem, exchange, gates, jobs, block_ends, sums, dk_out, dv_out, scale, softcap, queries,
    k_positions, dropping,
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr, IN_REGISTERS: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``w``: dK or dV of every block, and its part of dQ."""
    kv_ready, job_ready, job_free = gates[0], gates[2], gates[3]
    _, _, keys, kv_heads = block_ends
    mma_s: gl.constexpr = product_layout(HALF)
    stage, phase, turn, kv_phase, slot, slot_phase = 0, 0, 0, 0, 0, 0
    mbarrier.wait(job_ready.index(slot), slot_phase)
    first, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB, JOB)
    while tiles > 0:
        lo, length = seen_by(first, block_ends, mma_s)
        k_at = keys_at(k_positions, first, keys, mma_s, DROPOUT)
        mbarrier.wait(kv_ready, kv_phase)
        kv_phase ^= 1
        value = (smem[2].index(0).reshape([ROWS, smem[2].shape[4]]),)
        if IN_REGISTERS:
            value = (value[0].load(gl.DotOperandLayout(0, mma_s, k_width=2)),)
        job = (begin, before, full, tiles)
        plane, place = (batch * kv_heads + kv_head) * GROUP, 0
        gradient = attend(
            w, no_gradient(D if w == 0 else V), value, stage, phase, turn, smem, exchange, gates, sums, place,
            begin + nth(0, before, full, tiles - full) * BLOCK_M, tiles > full, lo, length, scale, softcap,
            k_at, plane, dropping, D, V, BLOCK_M, SOFTCAP, IN_REGISTERS, True, DROPOUT,
        )  # fmt: skip
        i = 0
        for _n in range(1, GROUP * tiles):
            place = place_of(i, plane, job, queries, BLOCK_M)
            i, plane = following(i, plane, tiles, GROUP)
            turn ^= 1
            stage, phase = advance(stage, phase, STAGES)
            gradient = attend(
                w, gradient, value, stage, phase, turn, smem, exchange, gates, sums, place,
                begin + nth(i, before, full, tiles - full) * BLOCK_M, i < tiles - full, lo, length, scale, softcap,
                k_at, plane, dropping, D, V, BLOCK_M, SOFTCAP, IN_REGISTERS, False, DROPOUT,
            )  # fmt: skip
        leave_block(
            w, gradient, stage, turn, smem, exchange, gates, sums, place_of(i, plane, job, queries, BLOCK_M), scale,
            dk_out, dv_out, batch, kv_head, first, keys, kv_heads, dropping[3], D, V, BLOCK_M, DROPOUT,
        )  # fmt: skip
        turn ^= 1
        stage, phase = advance(stage, phase, STAGES)
        mbarrier.arrive(job_free.index(slot))
        slot, slot_phase = advance(slot, slot_phase, 2)
        mbarrier.wait(job_ready.index(slot), slot_phase)
        first, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB, JOB)


@gluon.jit(
    do_not_specialize=[
        "queries", "keys", "first_head", "head_count", "batches", "heads_at_once", "programs",
        "heads_before", "threshold",
    ]
)  # fmt: skip
def backward_wide_kernel(
    q, k, v, dout,  # descriptors of [B, H, T, D], [B, G, K, D], [B, G, K, V], [B, H, T, V]
    stats,  # descriptor of float32 [2, B * H, T]
    col_lo, col_hi,  # int32 [K]
    dq,  # float32 [B * H * tiles, PARTS, ROWS, 64], added to
    dk, dv,  # [B, K, G, D], [B, K, G, V], float32 or q's dtype
    counter,  # int32 [2], zeros, and zeros again afterwards
    scale, softcap, queries, keys, kv_heads,
    first_head, head_count,  # the key heads of this launch
    batches, heads_at_once, programs,
    seed, heads_before, threshold, keep_scale,  # of `dropout.Dropout`, read if DROPOUT, as the positions are
    q_positions, k_positions,  # int32 [T], [K]
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, IN_REGISTERS: gl.constexpr, SOFTCAP: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES <= MAX_STAGES)
    gl.static_assert(BLOCK_M == 2 * HALF)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, ROWS], q.dtype)
    q_smem = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    dout_smem = gl.allocate_shared_memory(q.dtype, [STAGES] + dout.block_type.shape, dout.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES] + stats.block_type.shape, stats.layout)
    k_smem = gl.allocate_shared_memory(q.dtype, [1] + k.block_type.shape, k.layout)
    v_smem = gl.allocate_shared_memory(q.dtype, [1] + v.block_type.shape, v.layout)
    p_smem = gl.allocate_shared_memory(q.dtype, [2, BLOCK_M, ROWS], p_layout)
    ds_smem = gl.allocate_shared_memory(q.dtype, [2, BLOCK_M, ROWS], p_layout)
    jobs = gl.allocate_shared_memory(gl.int32, [2 * JOB, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gates = make_gates(STAGES, 2)

    smem = (q_smem, k_smem, v_smem, dout_smem, stats_smem)
    exchange = (p_smem, ds_smem)
    block_ends, heads = (col_lo, col_hi, keys, kv_heads), (first_head, head_count)
    dropping = (seed, heads_before, threshold, keep_scale, q_positions, queries, kv_heads * GROUP)
    gl.warp_specialize([
        (consume, (
            0, smem, exchange, gates, jobs, block_ends, dq, dk, dv, scale, softcap, queries,
            k_positions, dropping, GROUP, D, V, BLOCK_M, STAGES, SOFTCAP, IN_REGISTERS, DROPOUT,
        )),
        (consume, (
            1, smem, exchange, gates, jobs, block_ends, dq, dk, dv, scale, softcap, queries,
            k_positions, dropping, GROUP, D, V, BLOCK_M, STAGES, SOFTCAP, IN_REGISTERS, DROPOUT,
        )),
        (load_tiles, (
            q, k, v, dout, stats, smem, gates, jobs, counter, block_ends, heads, batches, heads_at_once, programs,
            GROUP, BLOCK_M, STAGES,
        )),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
