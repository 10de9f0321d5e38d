"""The forward kernel for Hopper: warpgroups that take turns at the tensor cores, fed by one warp that loads.

After FlashAttention-3 (https://arxiv.org/abs/2407.08608): each warpgroup holds 64 queries. The product Q K^T of the
next tile is in flight before P V of the last, and while one warpgroup computes its softmax, the other's products run.
The state between hops is that of the portable kernel.

As many programs run as there are multiprocessors, and each takes the next block of queries when it has room for it: the
loading warp asks for it, tells the others, and loads ahead while they finish the last one.

[Note: shapes] as in `common`.
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
    LN2,
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
    row_max,
    row_sum,
    span,
    sync,
    tanh,
)
from distflash.kernels.hopper.compat import async_load, async_store, barrier, reinterpret, store_wait

# Hardware barriers, beyond those that the compiler uses; of the last two, one a stage.
TURN = gl.constexpr(5)
K_FREE = gl.constexpr(8)
V_FREE = gl.constexpr(12)
MAX_STAGES = gl.constexpr(4)
JOB = gl.constexpr(6)  # first, plane, begin, before, full, tiles


@gluon.jit
def softmax(
    s, m, l, start, lo, hi, scale, softcap, layout: gl.constexpr, SOFTCAP: gl.constexpr, MASKED,
):  # fmt: skip
    """Take raw products ``s [ROWS, N]`` into the running maximum and sum.

    Returns P in float32, what to scale the past by, and the new maximum and sum.
    """
    factor = scale * LOG2E
    if SOFTCAP:
        s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        factor = 1.0
    if MASKED:  # a value of the loop: a tile inside every interval skips this
        keys = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
        s = gl.where((keys >= (lo - start)[:, None]) & (keys < (hi - start)[:, None]), s, float("-inf"))
    m_new = gl.maximum(m, row_max(s) * factor)
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * factor - shift[:, None])
    alpha = gl.exp2(m - shift)
    return p, alpha, m_new, l * alpha + row_sum(p)


@gluon.jit
def load_tiles(
    q, k, v, smem, gates, jobs, counter, ends, grid,
    SLOTS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: every block's queries, then keys and values of its tiles, as room becomes free."""
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    q_smem, k_smem, v_smem = smem
    q_ready, q_free, k_ready, v_ready = gates
    row_lo, row_hi = ends
    queries, heads, batches, heads_at_once, programs = grid
    blocks = gl.cdiv(queries, BLOCK_M)
    slot, slot_phase, stage, loaded = 0, 1, 0, 0
    program = gl.program_id(0)
    while program < blocks * heads * batches:
        block, plane = pick(program, blocks, heads * batches, heads_at_once)
        first = (blocks - 1 - block) * BLOCK_M  # under causal masks later rows see more: longest first
        begin, before, full, tiles = span(row_lo, row_hi, first, gl.minimum(first + BLOCK_M, queries) - 1, BLOCK_N, 1)
        batch, head = plane // heads, plane % heads
        kv_head = head // GROUP
        mbarrier.wait(q_free.index(slot), slot_phase)
        post(jobs, slot, (first, plane, begin, before, full, tiles))
        mbarrier.expect(q_ready.index(slot), CONSUMERS * q.block_type.nbytes)
        for w in gl.static_range(CONSUMERS):
            async_load(q, [batch, head, first + w * ROWS, 0], q_ready.index(slot), q_smem.index(slot * CONSUMERS + w))
        slot, slot_phase = advance(slot, slot_phase, SLOTS)
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
            stage, _ = advance(stage, 0, STAGES)
        program = next_job(counter, programs)
    mbarrier.wait(q_free.index(slot), slot_phase)
    post(jobs, slot, (0, 0, 0, 0, 0, 0))
    mbarrier.arrive(q_ready.index(slot))
    leave(counter, programs)


@gluon.jit
def attend(
    w: gl.constexpr, state, q, smem, gates, start, lo, hi, scale, softcap,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, mma_s: gl.constexpr, mma_o: gl.constexpr, SOFTCAP: gl.constexpr,
    MASKED,
):  # fmt: skip
    """Start Q K^T of the tile at ``start`` and P V of the tile before it; then this tile's softmax."""
    m, l, acc, p, stage, phase = state
    _, k_smem, v_smem = smem
    _, _, k_ready, v_ready = gates
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    DP: gl.constexpr = k_smem.shape[4]
    VP: gl.constexpr = v_smem.shape[4]
    following, following_phase = advance(stage, phase, STAGES)
    mbarrier.wait(k_ready.index(following), following_phase)
    mbarrier.wait(v_ready.index(stage), phase)
    sync(TURN + w, 256)
    key = k_smem.index(following).reshape([BLOCK_N, DP])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=mma_s)
    s = warpgroup_mma(q, key.permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, VP]), acc, is_async=True)
    arrive(TURN + (w + 1) % CONSUMERS, 256)
    s = warpgroup_mma_wait(1, [s])
    arrive(K_FREE + following, 32 + CONSUMERS * 128)
    p32, alpha, m, l = softmax(s, m, l, start, lo, hi, scale, softcap, mma_s, SOFTCAP, MASKED)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    arrive(V_FREE + stage, 32 + CONSUMERS * 128)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, mma_o))[:, None]
    p = gl.convert_layout(p32.to(p.dtype), p.type.layout)
    return m, l, acc, p, following, following_phase


@gluon.jit
def begin(
    sinks, sums, at_row, at_out, exists, kept, head, first_hop, mma_s: gl.constexpr, mma_o: gl.constexpr,
    SINKS: gl.constexpr,
):  # fmt: skip
    """The state ``(maximum, total, weighted)`` that queries start from: nothing, the sinks, or the last hop's."""
    maximum, total, weighted = sums
    VP: gl.constexpr = at_out.shape[1]
    m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, mma_s))
    acc = gl.zeros([ROWS, VP], gl.float32, layout=mma_o)
    if first_hop != 0:
        if SINKS:
            m = gl.full([ROWS], LOG2E, gl.float32, layout=m.type.layout) * gl.load(sinks + head).to(gl.float32)
        l = gl.where(m == float("-inf"), 0.0, 1.0)
    else:
        m = gl.load(maximum + at_row, mask=exists, other=float("-inf"))
        l = gl.load(total + at_row, mask=exists, other=0.0)
        acc = gl.load(weighted + at_out, mask=kept, other=0.0)
    return m, l, acc


@gluon.jit
def end(state, final, place, lse, sums, at_row, at_out, exists, kept, batch, head, first, last_hop):
    """Write the output through ``place``, where the queries were, or the state for the next hop."""
    m, l, acc = state
    maximum, total, weighted = sums
    if last_hop != 0:
        inverse = gl.where(l > 0.0, 1.0 / l, 0.0)
        gl.store(lse + at_row, (m + gl.log2(l)) * LN2, mask=exists)
        out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))[:, None]
        # Values may be narrower than keys: the first of as many places as there is room for.
        places = reinterpret(
            place, place.dtype, [place.shape[3] // acc.shape[1]] + final.block_type.shape, final.layout
        )
        staging = places.index(0)
        staging.reshape(acc.shape).store(out.to(staging.dtype))
        fence_async_shared()
        barrier()
        async_store(final, [batch, head, first, 0], staging)
    else:
        gl.store(maximum + at_row, m, mask=exists)
        gl.store(total + at_row, l, mask=exists)
        gl.store(weighted + at_out, acc, mask=kept)


@gluon.jit
def block(
    w: gl.constexpr, state, query, smem, gates, stage, phase, job, lo, hi, scale, softcap, previous, q_free,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, mma_s: gl.constexpr, mma_o: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Take all of a block's tiles into its state. ``previous`` is the last block's place, to be freed, or -1."""
    m, l, acc = state
    _, k_smem, v_smem = smem
    _, _, k_ready, v_ready = gates
    begin_at, before, full, tiles = job
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    VP: gl.constexpr = v_smem.shape[4]
    masked = tiles - full
    mbarrier.wait(k_ready.index(stage), phase)
    key = k_smem.index(stage).reshape([BLOCK_N, k_smem.shape[4]])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=mma_s)
    s = warpgroup_mma(query, key.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    arrive(K_FREE + stage, 32 + CONSUMERS * 128)
    start = begin_at + nth(0, before, full, masked) * BLOCK_N
    p32, alpha, m, l = softmax(s, m, l, start, lo, hi, scale, softcap, mma_s, SOFTCAP, masked > 0)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, mma_o))[:, None]
    p = gl.convert_layout(p32.to(k_smem.dtype), gl.DotOperandLayout(0, mma_o, k_width=2))
    if previous >= 0:  # by now, the last block's output has left its place
        store_wait(0)
        mbarrier.arrive(q_free.index(previous))
    for i in range(1, tiles):
        start = begin_at + nth(i, before, full, masked) * BLOCK_N
        m, l, acc, p, stage, phase = attend(
            w, (m, l, acc, p, stage, phase), query, smem, gates, start, lo, hi, scale, softcap,
            CONSUMERS, STAGES, mma_s, mma_o, SOFTCAP, i < masked,
        )  # fmt: skip
    mbarrier.wait(v_ready.index(stage), phase)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, VP]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    arrive(V_FREE + stage, 32 + CONSUMERS * 128)
    stage, phase = advance(stage, phase, STAGES)
    return (m, l, acc), stage, phase


@gluon.jit
def consume(
    w: gl.constexpr, final, smem, gates, jobs, ends, sinks, lse, sums, scale, softcap, sizes, hop,
    SLOTS: gl.constexpr, BLOCK_N: gl.constexpr, V: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``w``: attention of 64 queries of every block."""
    q_smem, _, v_smem = smem
    q_ready, q_free, _, _ = gates
    row_lo, row_hi = ends
    queries, heads = sizes
    first_hop, last_hop = hop
    VP: gl.constexpr = v_smem.shape[4]
    mma_s: gl.constexpr = product(BLOCK_N)
    mma_o: gl.constexpr = product(VP)
    if w == CONSUMERS - 1:
        arrive(TURN, 256)  # the first turn is the first warpgroup's

    stage, phase, slot, slot_phase, previous = 0, 0, 0, 0, -1
    mbarrier.wait(q_ready.index(slot), slot_phase)
    first, plane, begin_at, before, full, tiles = read(jobs, slot, JOB)
    while tiles > 0:
        batch, head = plane // heads, plane % heads
        first += w * ROWS
        rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_s))
        exists = rows < queries
        lo = gl.load(row_lo + rows, mask=exists, other=0)
        hi = gl.load(row_hi + rows, mask=exists, other=0)
        at_row = plane.to(gl.int64) * queries + rows
        rows_out = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_o))
        columns = gl.arange(0, VP, layout=gl.SliceLayout(0, mma_o))
        at_out = ((batch.to(gl.int64) * queries + rows_out) * heads + head)[:, None] * V + columns[None, :]
        kept = (rows_out < queries)[:, None] & (columns < V)[None, :]
        state = begin(sinks, sums, at_row, at_out, exists, kept, head, first_hop, mma_s, mma_o, SINKS)
        place = q_smem.index(slot * CONSUMERS + w)
        query = place.reshape([ROWS, q_smem.shape[4]])
        state, stage, phase = block(
            w, state, query, smem, gates, stage, phase, (begin_at, before, full, tiles), lo, hi, scale, softcap,
            previous, q_free, CONSUMERS, STAGES, mma_s, mma_o, SOFTCAP,
        )  # fmt: skip
        end(state, final, place, lse, sums, at_row, at_out, exists, kept, batch, head, first, last_hop)
        if SLOTS > 1:
            previous = slot
        else:  # nothing else can come before this place is free
            store_wait(0)
            mbarrier.arrive(q_free.index(slot))
        slot, slot_phase = advance(slot, slot_phase, SLOTS)
        mbarrier.wait(q_ready.index(slot), slot_phase)
        first, plane, begin_at, before, full, tiles = read(jobs, slot, JOB)
    store_wait(0)


@gluon.jit(do_not_specialize=["queries", "batches", "first_hop", "last_hop", "heads_at_once", "programs"])
def forward_kernel(
    q, k, v,  # descriptors of [B, H, T, D], [B, G, K, D], [B, G, K, V]
    row_lo, row_hi,  # int32 [T]
    sinks,  # [H], read where SINKS
    final, lse,  # descriptor of [B, H, T, V] in q's dtype, float32 [B, H, T]: written by the last hop
    maximum, total, weighted,  # float32 [B, H, T], [B, H, T], [B, T, H, V]: between hops
    counter,  # int32 [2], zeros, and zeros again afterwards
    scale, softcap, queries, heads, batches, first_hop, last_hop, heads_at_once, programs,
    GROUP: gl.constexpr, V: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, SLOTS: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES <= MAX_STAGES)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(q.dtype, [SLOTS * CONSUMERS] + q.block_type.shape, q.layout)
    k_smem = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    v_smem = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    jobs = gl.allocate_shared_memory(gl.int32, [SLOTS * JOB, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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

    smem = (q_smem, k_smem, v_smem)
    gates = (q_ready, q_free, k_ready, v_ready)
    ends = (row_lo, row_hi)
    sums = (maximum, total, weighted)
    sizes = (queries, heads)
    hop = (first_hop, last_hop)
    grid = (queries, heads, batches, heads_at_once, programs)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (
                0, final, smem, gates, jobs, ends, sinks, lse, sums, scale, softcap, sizes, hop,
                SLOTS, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS,
            )),
            (consume, (
                1, final, smem, gates, jobs, ends, sinks, lse, sums, scale, softcap, sizes, hop,
                SLOTS, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS,
            )),
            (load_tiles, (
                q, k, v, smem, gates, jobs, counter, ends, grid, SLOTS, GROUP, BLOCK_N, CONSUMERS, STAGES,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (
                0, final, smem, gates, jobs, ends, sinks, lse, sums, scale, softcap, sizes, hop,
                SLOTS, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS,
            )),
            (consume, (
                1, final, smem, gates, jobs, ends, sinks, lse, sums, scale, softcap, sizes, hop,
                SLOTS, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS,
            )),
            (consume, (
                2, final, smem, gates, jobs, ends, sinks, lse, sums, scale, softcap, sizes, hop,
                SLOTS, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS,
            )),
            (load_tiles, (
                q, k, v, smem, gates, jobs, counter, ends, grid, SLOTS, GROUP, BLOCK_N, CONSUMERS, STAGES,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 32])  # fmt: skip
