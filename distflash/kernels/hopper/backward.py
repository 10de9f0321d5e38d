"""The backward kernel for Hopper: dK, dV and dQ in one pass, five products a tile.

After FlashAttention-3 (https://arxiv.org/abs/2407.08608): a work tile is 128 keys, and the kernel loops over blocks of
queries. Each of two warpgroups holds 64 of the keys, with their dK and dV in registers. S and dP are computed
transposed, so P^T and dS^T are register operands of the products for dV and dK. dS is also written to shared memory,
because each warpgroup computes half of the block's dQ and needs all of dS. dQ is added to the float32 accumulator in
global memory, in the layout of `fragments`: by another warp, from shared memory, or by the warpgroup itself.

Unlike in FlashAttention-3, dQ of a block is computed one block later and overlaps the next softmax. So the tensor cores
are busy during the softmax. The warpgroups synchronise only for dS, and may be half a block apart.

Up to a head dim of 128; above, see `backward_wide`. [Note: shapes] as in `backward_parts`.
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
    is_masked,
    load_tiles,
    make_gates,
    place_of,
    probabilities,
    seen_by,
    store,
)
from distflash.kernels.hopper.common import ROWS, advance, arrive, product_layout, read, sync, visited
from distflash.kernels.hopper.compat import async_add, async_store, barrier, store_wait
from distflash.kernels.hopper.dropout import keys_at, rounded, score_gradient, thinned
from distflash.kernels.hopper.fragments import add, fragments
from distflash.kernels.hopper.ordered import await_turn, pass_turn

# Named barriers, besides those of `backward_parts`; one per warpgroup.
DQ_READY = gl.constexpr(9)
DQ_FREE = gl.constexpr(11)
DONE = gl.constexpr(15)
ONE_AND_WARP = gl.constexpr(160)


@gluon.jit
def add_in_order(
    dq, dq_smem, jobs, job_ready, job_free, turns, queries, kv_heads,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """The dQ warp, adding to each tile after all earlier blocks of keys of the head; see `ordered`."""
    semaphores, earlier = turns
    for w in gl.static_range(2):
        arrive(DQ_FREE + w, ONE_AND_WARP)
    slot, slot_phase = 0, 0
    mbarrier.wait(job_ready.index(slot), slot_phase)
    first, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB, JOB)
    while tiles > 0:
        job = (begin, before, full, tiles)
        turn = gl.load(earlier + first // (2 * ROWS))
        i, plane = 0, (batch * kv_heads + kv_head) * GROUP
        place = place_of(i, plane, job, queries, BLOCK_M, True)
        await_turn(semaphores + place, turn)
        for n in range(GROUP * tiles):
            for w in gl.static_range(2):
                sync(DQ_READY + w, ONE_AND_WARP)
                async_add(dq, [(2 * place + w) * ROWS, 0], dq_smem.index(w))
            store_wait(0)
            for w in gl.static_range(2):
                arrive(DQ_FREE + w, ONE_AND_WARP)
            more = n + 1 < GROUP * tiles
            i, plane = following(i, plane, tiles, GROUP)
            coming = gl.where(more, place_of(i, plane, job, queries, BLOCK_M, True), place)
            pass_turn(semaphores + place, semaphores + coming, turn, more)
            place = coming
        mbarrier.arrive(job_free.index(slot))
        slot, slot_phase = advance(slot, slot_phase, 2)
        mbarrier.wait(job_ready.index(slot), slot_phase)
        first, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB, JOB)


@gluon.jit
def add_queries(
    dq, dq_smem, jobs, job_ready, job_free, turns, queries, kv_heads,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, DIRECT: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """The dQ warp: add the two parts of each block's dQ, one of each warpgroup, to the accumulator in global memory."""
    if ORDERED:
        add_in_order(dq, dq_smem, jobs, job_ready, job_free, turns, queries, kv_heads, GROUP, BLOCK_M)
    elif not DIRECT:
        for w in gl.static_range(2):
            arrive(DQ_FREE + w, ONE_AND_WARP)
        slot, slot_phase = 0, 0
        mbarrier.wait(job_ready.index(slot), slot_phase)
        _, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB, JOB)
        while tiles > 0:
            for member in range(GROUP):
                plane = (batch * kv_heads + kv_head) * GROUP + member
                for i in range(tiles):
                    place = place_of(i, plane, (begin, before, full, tiles), queries, BLOCK_M)
                    for w in gl.static_range(2):
                        sync(DQ_READY + w, ONE_AND_WARP)
                        async_add(dq, [(2 * place + w) * ROWS, 0], dq_smem.index(w))
                    store_wait(0)
                    for w in gl.static_range(2):
                        arrive(DQ_FREE + w, ONE_AND_WARP)
            mbarrier.arrive(job_free.index(slot))
            slot, slot_phase = advance(slot, slot_phase, 2)
            mbarrier.wait(job_ready.index(slot), slot_phase)
            _, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB, JOB)


@gluon.jit
def query_part(w: gl.constexpr, ds_smem, k_smem, turn, zero, WIDTH: gl.constexpr):
    """Start this warpgroup's part of a tile's dQ = dS K, over all keys of the block: half of the columns.

    ``zero`` is 0; the compiler, if it does not know, forms the descriptors of half of the keys anew for every tile.
    """
    sync(DS_READY + 2 * turn + w, BOTH)
    dq = gl.zeros([ROWS, WIDTH], gl.float32, layout=product_layout(WIDTH))
    for n in gl.static_range(2):
        part = ds_smem.index(2 * turn + n)
        key = k_smem.index(n + n * zero).reshape([ROWS, k_smem.shape[4]]).slice(w * WIDTH, WIDTH, dim=1)
        dq = warpgroup_mma(part.permute((1, 0)), key, dq, use_acc=n > 0, is_async=True)
    return dq


@gluon.jit
def hand_over(w: gl.constexpr, dq, dq_smem, sums, place, DIRECT: gl.constexpr):
    """Add this warpgroup's part of a tile's dQ to the sums at its place, or give it to the adding warp."""
    SIZE: gl.constexpr = dq.shape[0] * dq.shape[1]
    if DIRECT:
        add(sums + (2 * place + w).to(gl.int64) * SIZE, dq)
    else:
        sync(DQ_FREE + w, ONE_AND_WARP)
        dq_smem.index(w).reshape([SIZE]).store(fragments(dq))
        fence_async_shared()
        arrive(DQ_READY + w, ONE_AND_WARP)


@gluon.jit
def attend(
    w: gl.constexpr, dk, dv, key, value, stage, phase, turn,
    smem, exchange, gates, sums, place, start, masked, lo, length, scale, softcap, k_at, plane, dropping,
    BLOCK_M: gl.constexpr, SOFTCAP: gl.constexpr, IN_REGISTERS: gl.constexpr, DIRECT: gl.constexpr,
    FIRST: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Add the tile of queries at ``start`` to dK and dV, and leave its dS for dQ.

    Unless it is a block's FIRST, the tile before it, whose place among the sums is ``place``, gets its dQ under this
    one's softmax.
    """
    q_smem, k_smem, v_smem, dout_smem, stats_smem = smem
    ds_smem, dq_smem = exchange
    _, _, _, _, q_ready, dout_ready = gates
    DP: gl.constexpr = k_smem.shape[4]
    VP: gl.constexpr = v_smem.shape[4]
    dtype: gl.constexpr = q_smem.dtype
    mma_s: gl.constexpr = product_layout(BLOCK_M)
    # The softcap's slope takes the registers in which dQ would wait under the softmax.
    DQ_FIRST: gl.constexpr = SOFTCAP and not IN_REGISTERS
    zero = 0
    if not IN_REGISTERS:
        # 0, but not to the compiler, which would form their descriptors once for all tiles, and have to spill them.
        zero = stage >> 1
        key = k_smem.index(w + zero).reshape([ROWS, DP])
        value = v_smem.index(w + zero).reshape([ROWS, VP])
    query = q_smem.index(stage).reshape([BLOCK_M, DP])
    gradient = dout_smem.index(stage).reshape([BLOCK_M, VP])
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=mma_s)

    mbarrier.wait(q_ready.index(stage), phase)
    s = warpgroup_mma(key, query.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse2 = stats_smem.index(2 * stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, mma_s))
    if not FIRST:
        dq = query_part(w, ds_smem, k_smem, turn ^ 1, zero, DP // 2)
    s = warpgroup_mma_wait(0 if FIRST else 2, [s])
    if not FIRST and DQ_FIRST:
        dq = warpgroup_mma_wait(0, [dq])
        hand_over(w, dq, dq_smem, sums, place, DIRECT)
    p, sloped = probabilities(s, lse2, start, lo, length, scale, softcap, mma_s, SOFTCAP, masked)
    p, sloped = thinned(p, sloped, start, k_at, plane, dropping, DROPOUT)
    p16 = gl.convert_layout(rounded(p, q_smem, DROPOUT), gl.DotOperandLayout(0, dv.type.layout, k_width=2))
    if not FIRST and not DQ_FIRST:
        dq = warpgroup_mma_wait(0, [dq])
        hand_over(w, dq, dq_smem, sums, place, DIRECT)
    mbarrier.wait(dout_ready.index(stage), phase)
    dp = warpgroup_mma(value, gradient.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dv = warpgroup_mma(p16, gradient, dv, is_async=True)
    delta = stats_smem.index(2 * stage + 1).reshape([BLOCK_M]).load(gl.SliceLayout(0, mma_s))
    dp = warpgroup_mma_wait(1, [dp])
    ds = score_gradient(sloped, dp, delta, dropping, DROPOUT)
    ds16 = ds.to(dtype)
    # Free since the other warpgroup's dS of the last tile was there: by then it had done with that of the one before.
    ds_smem.index(2 * turn + w).store(ds16)
    ds16 = gl.convert_layout(ds16, gl.DotOperandLayout(0, dk.type.layout, k_width=2))
    dk = warpgroup_mma(ds16, query, dk, is_async=True)
    fence_async_shared()
    arrive(DS_READY + 2 * turn + 1 - w, BOTH)
    dv, p16 = warpgroup_mma_wait(1, [dv, p16])
    dk, ds16 = warpgroup_mma_wait(0, [dk, ds16])
    arrive(FREE + stage, BOTH_AND_WARP)
    return dk, dv


@gluon.jit
def leave_block(
    w: gl.constexpr, dk, dv, dk_out, dv_out, smem, kv_free, batch, kv_head, first, keys, kv_heads,
    D: gl.constexpr, V: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Write a block's dK and dV, and free the places of its keys and values."""
    q_smem, k_smem, v_smem, _, _ = smem
    if WIDE:
        mbarrier.arrive(kv_free)
        store(dv_out, dv, batch, kv_head, first, 0, keys, kv_heads, V)
        store(dk_out, dk, batch, kv_head, first, 0, keys, kv_heads, D)
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
    w: gl.constexpr, smem, exchange, gates, jobs, block_ends, sums, dk_out, dv_out, scale, softcap, queries,
    k_positions, dropping,
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr, IN_REGISTERS: gl.constexpr, WIDE: gl.constexpr, DIRECT: gl.constexpr,
    ORDERED: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``w``: dK and dV of 64 keys of every block."""
    kv_ready, kv_free, job_ready, job_free = gates[0], gates[1], gates[2], gates[3]
    _, _, keys, kv_heads = block_ends
    DP: gl.constexpr = smem[1].shape[4]
    VP: gl.constexpr = smem[2].shape[4]
    mma_s: gl.constexpr = product_layout(BLOCK_M)
    mma_k: gl.constexpr = product_layout(DP)
    mma_v: gl.constexpr = product_layout(VP)
    stage, phase, turn, kv_phase, slot, slot_phase = 0, 0, 0, 0, 0, 0
    mbarrier.wait(job_ready.index(slot), slot_phase)
    first, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB, JOB)
    while tiles > 0:
        first += w * ROWS
        lo, length = seen_by(first, block_ends, mma_s)
        dk = gl.zeros([ROWS, DP], gl.float32, layout=mma_k)
        dv = gl.zeros([ROWS, VP], gl.float32, layout=mma_v)
        k_at = keys_at(k_positions, first, keys, mma_s, DROPOUT)
        mbarrier.wait(kv_ready, kv_phase)
        kv_phase ^= 1
        key = smem[1].index(w).reshape([ROWS, DP])
        value = smem[2].index(w).reshape([ROWS, VP])
        if IN_REGISTERS:
            key = key.load(gl.DotOperandLayout(0, mma_s, k_width=2))
            value = value.load(gl.DotOperandLayout(0, mma_s, k_width=2))
        job = (begin, before, full, tiles)
        plane, place = (batch * kv_heads + kv_head) * GROUP, 0
        dk, dv = attend(
            w, dk, dv, key, value, stage, phase, turn, smem, exchange, gates, sums, place,
            begin + visited(0, before, full, tiles, ORDERED) * BLOCK_M,
            is_masked(0, before, full, tiles, True) if ORDERED else tiles > full, lo, length, scale, softcap,
            k_at, plane, dropping, BLOCK_M, SOFTCAP, IN_REGISTERS, DIRECT, True, DROPOUT,
        )  # fmt: skip
        i = 0
        for _n in range(1, GROUP * tiles):
            place = place_of(i, plane, job, queries, BLOCK_M, ORDERED)
            i, plane = following(i, plane, tiles, GROUP)
            turn ^= 1
            stage, phase = advance(stage, phase, STAGES)
            dk, dv = attend(
                w, dk, dv, key, value, stage, phase, turn, smem, exchange, gates, sums, place,
                begin + visited(i, before, full, tiles, ORDERED) * BLOCK_M,
                is_masked(i, before, full, tiles, ORDERED), lo, length, scale, softcap,
                k_at, plane, dropping, BLOCK_M, SOFTCAP, IN_REGISTERS, DIRECT, False, DROPOUT,
            )  # fmt: skip
        dq = warpgroup_mma_wait(0, [query_part(w, exchange[0], smem[1], turn, 0, DP // 2)])
        hand_over(w, dq, exchange[1], sums, place_of(i, plane, job, queries, BLOCK_M, ORDERED), DIRECT)
        turn ^= 1
        stage, phase = advance(stage, phase, STAGES)
        if DROPOUT != 0:
            dk, dv = dk * dropping[3], dv * dropping[3]
        leave_block(w, dk * scale, dv, dk_out, dv_out, smem, kv_free, batch, kv_head, first, keys, kv_heads, D, V, WIDE)
        mbarrier.arrive(job_free.index(slot))
        slot, slot_phase = advance(slot, slot_phase, 2)
        mbarrier.wait(job_ready.index(slot), slot_phase)
        first, batch, kv_head, begin, before, full, tiles = read(jobs, slot, JOB, JOB)


@gluon.jit(
    do_not_specialize=[
        "dk",
        "dv",
        "queries",
        "keys",
        "first_head",
        "head_count",
        "batches",
        "heads_at_once",
        "programs",
        "heads_before",
        "threshold",
    ]
)
def backward_kernel(
    q, k, v, dout,  # descriptors of [B, H, T, D], [B, G, K, D], [B, G, K, V], [B, H, T, V]
    stats,  # descriptor of float32 [2, B * H, T]
    col_lo, col_hi,  # int32 [K]
    dq,  # float32 [B * H * tiles, 2, ROWS, D / 2], added to; a pointer if DIRECT, else a descriptor of rows
    dk, dv,  # float32 [B, K, G, D], [B, K, G, V] if WIDE, else descriptors of [B, G, K, D], [B, G, K, V] in q's dtype
    counter,  # int32 [2], zeros, and zeros again afterwards
    semaphores, earlier,  # if ORDERED int32 [B * H * tiles] and [blocks], see `turns`; else None
    scale, softcap, queries, keys, kv_heads,
    first_head, head_count,  # the key heads of this launch
    batches, heads_at_once, programs,
    seed, heads_before, threshold, keep_scale,  # of `dropout.Dropout`, read if DROPOUT, as the positions are
    q_positions, k_positions,  # int32 [T], [K]
    GROUP: gl.constexpr, D: gl.constexpr, V: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, IN_REGISTERS: gl.constexpr, WIDE: gl.constexpr, DIRECT: gl.constexpr,
    SOFTCAP: gl.constexpr, ORDERED: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    gl.static_assert(not (ORDERED and DIRECT))
    gl.static_assert(STAGES <= MAX_STAGES)
    gl.static_assert(BLOCK_M == ROWS)  # a part of dQ is a product of 64 rows
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], q.dtype)
    q_smem = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    dout_smem = gl.allocate_shared_memory(q.dtype, [STAGES] + dout.block_type.shape, dout.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES] + stats.block_type.shape, stats.layout)
    k_smem = gl.allocate_shared_memory(q.dtype, [2] + k.block_type.shape, k.layout)
    v_smem = gl.allocate_shared_memory(q.dtype, [2] + v.block_type.shape, v.layout)
    ds_smem = gl.allocate_shared_memory(q.dtype, [4, ROWS, BLOCK_M], ds_layout)
    jobs = gl.allocate_shared_memory(gl.int32, [2 * JOB, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    dq_smem = jobs  # where there is none
    if not DIRECT:
        dq_smem = gl.allocate_shared_memory(gl.float32, [2] + dq.block_type.shape, dq.layout)
    gates = make_gates(STAGES, 2 if DIRECT else 3)
    job_ready, job_free = gates[2], gates[3]

    smem = (q_smem, k_smem, v_smem, dout_smem, stats_smem)
    exchange = (ds_smem, dq_smem)
    block_ends, heads = (col_lo, col_hi, keys, kv_heads), (first_head, head_count)
    dropping = (seed, heads_before, threshold, keep_scale, q_positions, queries, kv_heads * GROUP)
    gl.warp_specialize([
        (consume, (
            0, smem, exchange, gates, jobs, block_ends, dq, dk, dv, scale, softcap, queries,
            k_positions, dropping,
            GROUP, D, V, BLOCK_M, STAGES, SOFTCAP, IN_REGISTERS, WIDE, DIRECT, ORDERED, DROPOUT,
        )),
        (consume, (
            1, smem, exchange, gates, jobs, block_ends, dq, dk, dv, scale, softcap, queries,
            k_positions, dropping,
            GROUP, D, V, BLOCK_M, STAGES, SOFTCAP, IN_REGISTERS, WIDE, DIRECT, ORDERED, DROPOUT,
        )),
        (load_tiles, (
            q, k, v, dout, stats, smem, gates, jobs, counter, block_ends, heads, batches, heads_at_once, programs,
            GROUP, BLOCK_M, STAGES, ORDERED,
        )),
        (add_queries, (
            dq, dq_smem, jobs, job_ready, job_free, (semaphores, earlier), queries, kv_heads,
            GROUP, BLOCK_M, DIRECT, ORDERED,
        )),
    ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip
