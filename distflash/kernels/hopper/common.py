"""What the Hopper kernels share: walking intervals, forming scores, moving tiles.

[Note: shapes] B batch, T local queries, K local keys of the owner, H query heads, G key/value heads, D head dim of q
and k, V head dim of v. DP and VP are D and V padded to the next power of two. ROWS queries belong to one warpgroup.

Scores live in base 2, as in the portable kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of one warpgroup's matrix instruction


@gluon.constexpr_function
def product(columns):
    """The layout of a warpgroup's product of 64 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def pick(program, blocks, heads, heads_at_once):
    """Which ``(block, head)`` a program works on; see the function of this name in the portable kernel."""
    group = program // (heads_at_once * blocks)
    rest = program % (heads_at_once * blocks)
    width = gl.minimum(heads - group * heads_at_once, heads_at_once)
    return rest // width, group * heads_at_once + rest % width


@gluon.jit
def span(lo, hi, first, last, STEP: gl.constexpr, ALIGN: gl.constexpr):
    """The tiles of ``STEP`` a block must visit, at least one; see the function of this name in the portable kernel."""
    begin = gl.load(lo + first) // ALIGN * ALIGN
    tiles = gl.maximum(gl.cdiv(gl.load(hi + last) - begin, STEP), 1)
    before = gl.minimum(gl.cdiv(gl.load(lo + last) - begin, STEP), tiles)
    full = gl.maximum((gl.load(hi + first) - begin) // STEP - before, 0)
    return begin, before, full, tiles


@gluon.jit
def nth(i, before, full, masked):
    """The tile to visit as ``i``-th: those that need a mask first, then the full ones between them."""
    return gl.where(i >= masked, i - masked + before, gl.where(i < before, i, i + full))


@gluon.jit
def row_parts(x):
    """Columns of ``x [ROWS, N]`` as ``[ROWS, N / 32, 4, 4, 2]``, of which only the last but one is spread over threads.

    In a product's layout a thread holds columns 8 j + 2 l and 8 j + 2 l + 1 for its l of 0 to 3 and every j. One
    reduction over all columns would be a long chain of dependent instructions in each thread; one dimension after the
    other is as many instructions in short chains.
    """
    return x.reshape([x.shape[0], x.shape[1] // 32, 4, 4, 2])


@gluon.jit
def row_max(x):
    parts = gl.max(gl.max(gl.max(row_parts(x), 1), 1), 2)
    return gl.convert_layout(gl.max(parts, 1), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def row_sum(x):
    parts = gl.sum(gl.sum(gl.sum(row_parts(x), 1), 1), 2)
    return gl.convert_layout(gl.sum(parts, 1), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def advance(place, phase, PLACES: gl.constexpr):
    """The next place of a ring of buffers, and the phase of its barriers, which flips with every round."""
    last = place == PLACES - 1
    return gl.where(last, 0, place + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def sync(number, threads):
    """Wait at the hardware's barrier ``number`` until so many threads have come, those that only `arrive` included."""
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [number, threads], gl.int32, False, 1)


@gluon.jit
def arrive(number, threads):
    """Be counted at a barrier without waiting for it."""
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [number, threads], gl.int32, False, 1)


@gluon.jit
def post(jobs, slot, values):
    """Write a job, a tuple of scalars, into shared memory; the barrier that makes it visible is the caller's."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for n in gl.static_range(len(values)):
        jobs.index(slot * len(values) + n).store(gl.full([1], 0, gl.int32, layout=one) + values[n])


@gluon.jit
def read(jobs, slot, COUNT: gl.constexpr):
    """The scalars of a job."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    values = ()  # of scalars, one after the other
    for n in gl.static_range(COUNT):
        values += (gl.max(jobs.index(slot * COUNT + n).load(one), 0),)  # type: ignore[assignment]
    return values


@gluon.jit
def next_job(counter, programs):
    """The next job of a grid of ``programs``, whichever program asks first."""
    return programs + gl.atomic_add(counter, 1)


@gluon.jit
def leave(counter, programs):
    """Called once by every program after its last `next_job`: the last one to leave sets the counters back to 0."""
    if gl.atomic_add(counter + 1, 1) == programs - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def tanh(x):
    return 1.0 - 2.0 / (gl.exp2(x * (2.0 * LOG2E)) + 1.0)
