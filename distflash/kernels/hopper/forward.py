"""The forward kernel for Hopper: warpgroups that take turns at the tensor cores, fed by one warp that loads.

After FlashAttention-3 (https://arxiv.org/abs/2407.08608): each warpgroup holds 64 queries. While the product Q K^T of the
next tile and P V of the last are in flight, it computes the softmax between them; and while one warpgroup computes its
softmax, the other's products run. The state between hops is that of the portable kernel.

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

from distflash.kernels.hopper.common import LN2, LOG2E, ROWS, nth, pick, span, tanh
from distflash.kernels.hopper.compat import async_load, async_store, barrier, store_wait


@gluon.jit
def softmax(s, m, l, start, lo, hi, scale, softcap, layout: gl.constexpr, SOFTCAP: gl.constexpr, MASKED):
    """Take raw products ``s [ROWS, N]`` into the running maximum and sum; P in float32, and what to scale the past by."""
    factor = scale * LOG2E
    if SOFTCAP:
        s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        factor = 1.0
    if MASKED:  # a value of the loop: a tile inside every interval skips this
        keys = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
        s = gl.where((keys >= (lo - start)[:, None]) & (keys < (hi - start)[:, None]), s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * factor - shift[:, None])
    alpha = gl.exp2(m - shift)
    return p, alpha, m_new, l * alpha + gl.sum(p, 1)


@gluon.jit
def tile_of(program, row_lo, row_hi, queries, heads, batches, heads_at_once, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Block, batch and head of a program, and the tiles of keys it visits."""
    blocks = gl.cdiv(queries, BLOCK_M)
    block, plane = pick(program, blocks, heads * batches, heads_at_once)
    first = (blocks - 1 - block) * BLOCK_M  # under causal masks later rows see more: longest first
    begin, before, full, tiles = span(row_lo, row_hi, first, gl.minimum(first + BLOCK_M, queries) - 1, BLOCK_N, 1)
    return first, plane, begin, before, full, tiles


@gluon.jit
def load_tiles(
    q, k, v, tiles_smem, gates, job,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: every block's queries, then keys and values of its tiles, as room becomes free."""
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    q_smem, k_smem, v_smem = tiles_smem
    q_ready, q_free, k_ready, k_free, v_ready, v_free = gates
    row_lo, row_hi, queries, heads, batches, heads_at_once, programs = job
    stage, phase, turn = 0, 1, 1
    total = gl.cdiv(queries, BLOCK_M) * heads * batches
    for program in range(gl.program_id(0), total, programs):
        first, plane, begin, before, full, tiles = tile_of(
            program, row_lo, row_hi, queries, heads, batches, heads_at_once, BLOCK_M, BLOCK_N
        )
        batch, head = plane // heads, plane % heads
        kv_head = head // GROUP
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(w), turn)
            mbarrier.expect(q_ready.index(w), q.block_type.nbytes)
            async_load(q, [batch, head, first + w * ROWS, 0], q_ready.index(w), q_smem.index(w))
        turn ^= 1
        for i in range(tiles):
            start = begin + nth(i, before, full, tiles - full) * BLOCK_N
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), k.block_type.nbytes)
            async_load(k, [batch, kv_head, start, 0], k_ready.index(stage), k_smem.index(stage))
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_ready.index(stage), v.block_type.nbytes)
            async_load(v, [batch, kv_head, start, 0], v_ready.index(stage), v_smem.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def attend(
    state, q, tiles_smem, gates, my_turn, next_turn, start, lo, hi, scale, softcap,
    STAGES: gl.constexpr, mma_s: gl.constexpr, mma_o: gl.constexpr, SOFTCAP: gl.constexpr, MASKED,
):  # fmt: skip
    """Start Q K^T of the tile at ``start`` and P V of the tile before it; then this tile's softmax."""
    m, l, acc, p, stage, phase, turn = state
    _, k_smem, v_smem = tiles_smem
    _, _, k_ready, k_free, v_ready, v_free = gates
    following = stage + 1
    wrapped = following == STAGES
    following = gl.where(wrapped, 0, following)
    following_phase = gl.where(wrapped, phase ^ 1, phase)
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    DP: gl.constexpr = k_smem.shape[4]
    VP: gl.constexpr = v_smem.shape[4]
    mbarrier.wait(k_ready.index(following), following_phase)
    mbarrier.wait(my_turn, turn)
    mbarrier.wait(v_ready.index(stage), phase)
    key = k_smem.index(following).reshape([BLOCK_N, DP])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=mma_s)
    s = warpgroup_mma(q, key.permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, VP]), acc, is_async=True)
    mbarrier.arrive(next_turn)
    s, acc, p = warpgroup_mma_wait(1, [s, acc, p])
    mbarrier.arrive(k_free.index(following))
    p32, alpha, m, l = softmax(s, m, l, start, lo, hi, scale, softcap, mma_s, SOFTCAP, MASKED)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    mbarrier.arrive(v_free.index(stage))
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, mma_o))
    acc = acc * alpha[:, None]
    p = gl.convert_layout(p32.to(p.dtype), p.type.layout)
    return m, l, acc, p, following, following_phase, turn ^ 1


@gluon.jit
def consume(
    w: gl.constexpr, final_desc, tiles_smem, gates, turns,
    job, rest, BLOCK_N: gl.constexpr, V: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``w``: attention of 64 queries of every block."""
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    q_smem, k_smem, v_smem = tiles_smem
    q_ready, q_free, k_ready, k_free, v_ready, v_free = gates
    row_lo, row_hi, queries, heads, batches, heads_at_once, programs = job
    sinks, lse, maximum, total, weighted, scale, softcap, first_hop, last_hop = rest
    DP: gl.constexpr = k_smem.shape[4]
    VP: gl.constexpr = v_smem.shape[4]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VP, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma_o, k_width=2)
    rows_s: gl.constexpr = gl.SliceLayout(1, mma_s)
    rows_o: gl.constexpr = gl.SliceLayout(1, mma_o)
    dtype: gl.constexpr = q_smem.dtype

    stage, phase = 0, 0
    q_phase = 0
    turn = 1 if w == 0 else 0
    jobs = gl.cdiv(queries, BLOCK_M) * heads * batches
    for program in range(gl.program_id(0), jobs, programs):
        block, plane, begin, before, full, tiles = tile_of(
            program, row_lo, row_hi, queries, heads, batches, heads_at_once, BLOCK_M, BLOCK_N
        )
        batch, head = plane // heads, plane % heads
        first = block + w * ROWS
        rows = first + gl.arange(0, ROWS, layout=rows_s)
        exists = rows < queries
        lo = gl.load(row_lo + rows, mask=exists, other=0)
        hi = gl.load(row_hi + rows, mask=exists, other=0)

        at_row = plane.to(gl.int64) * queries + rows
        rows_out = first + gl.arange(0, ROWS, layout=rows_o)
        columns = gl.arange(0, VP, layout=gl.SliceLayout(0, mma_o))
        at_out = ((batch.to(gl.int64) * queries + rows_out) * heads + head)[:, None] * V + columns[None, :]
        kept = (rows_out < queries)[:, None] & (columns < V)[None, :]
        m = gl.full([ROWS], float("-inf"), gl.float32, layout=rows_s)
        acc = gl.zeros([ROWS, VP], gl.float32, layout=mma_o)
        if first_hop != 0:
            if SINKS:
                m = gl.full([ROWS], LOG2E, gl.float32, layout=rows_s) * gl.load(sinks + head).to(gl.float32)
            l = gl.where(m == float("-inf"), 0.0, 1.0)
        else:
            m = gl.load(maximum + at_row, mask=exists, other=float("-inf"))
            l = gl.load(total + at_row, mask=exists, other=0.0)
            acc = gl.load(weighted + at_out, mask=kept, other=0.0)

        mbarrier.wait(q_ready.index(w), q_phase)
        query = q_smem.index(w).reshape([ROWS, DP])
        masked = tiles - full
        mbarrier.wait(k_ready.index(stage), phase)
        key = k_smem.index(stage).reshape([BLOCK_N, DP])
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=mma_s)
        s = warpgroup_mma(query, key.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_free.index(stage))
        start = begin + nth(0, before, full, masked) * BLOCK_N
        p32, alpha, m, l = softmax(s, m, l, start, lo, hi, scale, softcap, mma_s, SOFTCAP, True)
        acc = acc * gl.convert_layout(alpha, rows_o)[:, None]
        p = gl.convert_layout(p32.to(dtype), left)

        for i in range(1, tiles):
            start = begin + nth(i, before, full, masked) * BLOCK_N
            m, l, acc, p, stage, phase, turn = attend(
                (m, l, acc, p, stage, phase, turn), query, tiles_smem, gates,
                turns.index(w), turns.index((w + 1) % CONSUMERS), start, lo, hi, scale, softcap,
                STAGES, mma_s, mma_o, SOFTCAP, i < masked,
            )  # fmt: skip
        mbarrier.wait(v_ready.index(stage), phase)
        acc = warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_N, VP]), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(v_free.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        q_phase ^= 1

        if last_hop != 0:
            inverse = gl.where(l > 0.0, 1.0 / l, 0.0)
            gl.store(lse + at_row, (m + gl.log2(l)) * LN2, mask=exists)
            out = (acc * gl.convert_layout(inverse, rows_o)[:, None]).to(dtype)
            staging = q_smem.index(w)._reinterpret(dtype, [1, 1, ROWS, VP], final_desc.layout)
            staging.reshape([ROWS, VP]).store(out)
            fence_async_shared()
            barrier()
            async_store(final_desc, [batch, head, first, 0], staging)
            store_wait(0)
            barrier()
        else:
            gl.store(maximum + at_row, m, mask=exists)
            gl.store(total + at_row, l, mask=exists)
            gl.store(weighted + at_out, acc, mask=kept)
        mbarrier.arrive(q_free.index(w))


@gluon.jit(do_not_specialize=["queries", "batches", "first_hop", "last_hop", "heads_at_once", "programs"])
def forward_kernel(
    q, k, v,  # descriptors of [B, H, T, D], [B, G, K, D], [B, G, K, V]
    row_lo, row_hi,  # int32 [T]
    sinks,  # [H], read where SINKS
    final, lse,  # descriptor of [B, H, T, V] in q's dtype, float32 [B, H, T]: written by the last hop
    maximum, total, weighted,  # float32 [B, H, T], [B, H, T], [B, T, H, V]: between hops
    scale, softcap, queries, heads, batches, first_hop, last_hop, heads_at_once, programs,
    GROUP: gl.constexpr, V: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q.dtype, [CONSUMERS] + q.block_type.shape, q.layout)
    k_smem = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    v_smem = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], one)
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], one)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], one)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    for w in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(w), count=1)
        mbarrier.init(q_free.index(w), count=1)
        mbarrier.init(turns.index(w), count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(n), count=1)
        mbarrier.init(v_ready.index(n), count=1)
        mbarrier.init(k_free.index(n), count=CONSUMERS)
        mbarrier.init(v_free.index(n), count=CONSUMERS)
    fence_async_shared()

    tiles_smem = (q_smem, k_smem, v_smem)
    gates = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    job = (row_lo, row_hi, queries, heads, batches, heads_at_once, programs)
    rest = (sinks, lse, maximum, total, weighted, scale, softcap, first_hop, last_hop)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(consume, (0, final, tiles_smem, gates, turns, job, rest, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS)), (consume, (1, final, tiles_smem, gates, turns, job, rest, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS)), (load_tiles, (q, k, v, tiles_smem, gates, job, GROUP, BLOCK_N, CONSUMERS, STAGES))], [4, 1], [REGISTERS, 24]
        )
    else:
        gl.warp_specialize(
            [(consume, (0, final, tiles_smem, gates, turns, job, rest, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS)), (consume, (1, final, tiles_smem, gates, turns, job, rest, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS)), (consume, (2, final, tiles_smem, gates, turns, job, rest, BLOCK_N, V, CONSUMERS, STAGES, SOFTCAP, SINKS)), (load_tiles, (q, k, v, tiles_smem, gates, job, GROUP, BLOCK_N, CONSUMERS, STAGES))],
            [4, 4, 1], [REGISTERS, REGISTERS, 32],
        )  # fmt: skip
