"""The softmax state of a block of queries in the forward kernel: where it starts, and where it goes.

[Note: shapes] as in `common`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from distflash.kernels.hopper.common import LN2, LOG2E, ROWS
from distflash.kernels.hopper.compat import async_store, barrier, reinterpret

LOWEST = gl.constexpr(-3.0e38)  # in place of -inf, whose differences are NaN


@gluon.jit
def places(first, plane, sizes, V: gl.constexpr, VP: gl.constexpr, mma_s: gl.constexpr, mma_o: gl.constexpr):
    """The offsets of the rows from ``first`` on in ``[B, H, T]`` and ``[B, T, H, V]``, and which of them exist."""
    queries, heads = sizes
    batch, head = plane // heads, plane % heads
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_s))
    rows_out = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma_o))
    columns = gl.arange(0, VP, layout=gl.SliceLayout(0, mma_o))
    at_out = ((batch.to(gl.int64) * queries + rows_out) * heads + head)[:, None] * V + columns[None, :]
    exists_out = (rows_out < queries)[:, None] & (columns < V)[None, :]
    return plane.to(gl.int64) * queries + rows, at_out, rows < queries, exists_out


@gluon.jit
def start_state(
    sinks, running, first, plane, starts, sizes, keep_scale, V: gl.constexpr, VP: gl.constexpr, mma_s: gl.constexpr,
    mma_o: gl.constexpr, SINKS: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """The state ``(maximum, total, weighted)`` to start from: the identity, the sinks, or the running state."""
    maximum, total, weighted = running
    m = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, mma_s))
    acc = gl.zeros([ROWS, VP], gl.float32, layout=mma_o)
    if starts != 0:
        if SINKS:
            head = plane % sizes[1]
            m = gl.full([ROWS], LOG2E, gl.float32, layout=m.type.layout) * gl.load(sinks + head).to(gl.float32)
        l = gl.where(m == float("-inf"), 0.0, 1.0)
    else:
        at_row, at_out, exists, exists_out = places(first, plane, sizes, V, VP, mma_s, mma_o)
        m = gl.load(maximum + at_row, mask=exists, other=float("-inf"))
        l = gl.load(total + at_row, mask=exists, other=0.0)
        acc = gl.load(weighted + at_out, mask=exists_out, other=0.0)
        if DROPOUT != 0:  # a pass adds values without the scale, which `end_state` multiplies by
            acc = acc * (1.0 / keep_scale)
    return gl.maximum(m, LOWEST), l, acc


@gluon.jit
def with_sink(m, l, sink):
    """Maximum and total with one more logit, natural and without a value, and the factor of the weighted values."""
    m_new = gl.maximum(m, sink * LOG2E)
    alpha = gl.exp2(m - m_new)
    return m_new, l * alpha + gl.exp2(sink * LOG2E - m_new), alpha


@gluon.jit
def end_state(
    state, final, staging, lse, sinks, running, first, plane, is_last, sizes, keep_scale,
    V: gl.constexpr, VP: gl.constexpr, mma_s: gl.constexpr, mma_o: gl.constexpr,
    SINKS: gl.constexpr, MAXIMA: gl.constexpr, DROPOUT: gl.constexpr,
):  # fmt: skip
    """Epilogue: write O through ``staging``, which is Q's shared memory, or the running state for the next pass."""
    m, l, acc = state
    maximum, total, weighted = running
    if DROPOUT != 0:
        acc = acc * keep_scale
    at_row, at_out, exists, exists_out = places(first, plane, sizes, V, VP, mma_s, mma_o)
    if is_last != 0:
        alpha = 1.0
        if MAXIMA:
            gl.store(maximum + at_row, gl.where(l > 0.0, m, float("-inf")), mask=exists)
            if SINKS:
                m, l, alpha = with_sink(m, l, gl.load(sinks + plane % sizes[1]).to(gl.float32))
        inverse = gl.where(l > 0.0, alpha / l, 0.0)
        gl.store(lse + at_row, (m + gl.log2(l)) * LN2, mask=exists)
        out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))[:, None]
        # Values may be narrower than keys: use the first part of Q's shared memory.
        room = reinterpret(staging, staging.dtype, [staging.shape[3] // VP] + final.block_type.shape, final.layout)
        room.index(0).reshape(acc.shape).store(out.to(staging.dtype))
        fence_async_shared()
        barrier()
        async_store(final, [plane // sizes[1], plane % sizes[1], first, 0], room.index(0))
    else:
        gl.store(maximum + at_row, gl.where(l > 0.0, m, float("-inf")), mask=exists)
        gl.store(total + at_row, l, mask=exists)
        gl.store(weighted + at_out, acc, mask=exists_out)
