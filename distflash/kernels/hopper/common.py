"""Device functions that the Hopper kernels share: intervals, scores, tiles and the tile scheduler.

[Note: shapes] B batch, T local queries, K local keys of the source, H query heads, G key/value heads, D head dim of q
and k, V head dim of v. DP and VP are D and V padded to the next power of two. ROWS queries belong to one warpgroup.

Scores are in base 2, as in the portable kernel.

[Note: who waits for whom] Work tiles (a tuple of scalars, called a job) and tiles of tensors are passed through shared
memory. Only one of the threads that access it arrives at the mbarrier. Before that, the compiler inserts a barrier of
the warpgroup or the warp, so all of its threads have finished their access. At named barriers every thread arrives.
Warp-specialised partitions start after a barrier of all threads. compute-sanitizer's racecheck does not follow
mbarriers between warps, so it reports the scalars of work tiles (`post`, `read`) and a kernel's first lines as hazards
although they are none. `tools.compile_hopper` checks the order in the PTX of every kernel.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from distflash import liveness

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
GROUP_ROWS = gl.constexpr(liveness.GROUP_ROWS)
LIVE = gl.constexpr(liveness.LIVE)
STARTS = gl.constexpr(liveness.STARTS)
ENDS = gl.constexpr(liveness.ENDS)
BEGUN_BITS = gl.constexpr(liveness.BEGUN_BITS)
ROWS = gl.constexpr(64)  # of one warpgroup's matrix instruction


@gluon.constexpr_function
def product_layout(columns):
    """The layout of a warpgroup's product, of 64 rows, in registers."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def columns_of(dim):
    """How many columns of a head dim to multiply; the tiles in shared memory may be wider."""
    return (dim + 63) // 64 * 64


@gluon.jit
def column_chunks(x, COLUMNS: gl.constexpr):
    """The first COLUMNS of a tile in shared memory, in the fewest chunks whose widths are powers of two."""
    if COLUMNS == 192:
        return x.slice(0, 128, dim=1), x.slice(128, 64, dim=1)
    else:
        return (x,)


@gluon.jit
def row_products(a, b, zeros):
    """Issue A B^T, of the column chunks of A and the same columns of B."""
    if len(a) == 2:
        s = warpgroup_mma(a[0], b.slice(0, 128, dim=1).permute((1, 0)), zeros, use_acc=False, is_async=True)
        return warpgroup_mma(a[1], b.slice(128, 64, dim=1).permute((1, 0)), s, is_async=True)
    else:
        return warpgroup_mma(a[0], b.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def pick(program, blocks, heads, heads_at_once):
    """Which ``(block, head)`` a program works on; see the function of this name in the portable kernel."""
    group = program // (heads_at_once * blocks)
    rest = program % (heads_at_once * blocks)
    width = gl.minimum(heads - group * heads_at_once, heads_at_once)
    return rest // width, group * heads_at_once + rest % width


@gluon.jit
def locate(row, groups, flags):
    """The first row of a block of rows, and its flags; see the function of this name in the portable kernel."""
    group = row // GROUP_ROWS
    live = flags < 0
    start = gl.load(groups + 2 * group, mask=live, other=group * GROUP_ROWS)
    flags = gl.load(groups + 2 * group + 1, mask=live, other=flags)
    return start + row % GROUP_ROWS, flags


@gluon.jit
def span(lo, hi, first, last, STEP: gl.constexpr, ALIGN: gl.constexpr):
    """The tiles of ``STEP`` that a block processes; see the portable kernel's function of this name.

    None if the block's interval is empty: such a block may start at the end of the tensor.
    """
    start, stop = gl.load(lo + first), gl.load(hi + last)
    begin = start // ALIGN * ALIGN
    tiles = gl.where(stop > start, gl.cdiv(stop - begin, STEP), 0)
    before = gl.minimum(gl.cdiv(gl.load(lo + last) - begin, STEP), tiles)
    full = gl.maximum((gl.load(hi + first) - begin) // STEP - before, 0)
    return begin, before, full, tiles


@gluon.jit
def nth(i, before, full, masked):
    """The ``i``-th tile of a block: the masked tiles first, then the full ones between them."""
    return gl.where(i >= masked, i - masked + before, gl.where(i < before, i, i + full))


@gluon.jit
def visited(i, before, full, tiles, ORDERED: gl.constexpr):
    """Which of its tiles a block of keys visits as the ``i``-th: `nth`, or if ORDERED the last one first.

    Under a causal mask all blocks of a head see the last queries. So from the last one on, each can follow the block
    before it at a small distance; from the first one on, it would wait until that block has come down to the diagonal.
    """
    if ORDERED:
        return tiles - 1 - i
    else:
        return nth(i, before, full, tiles - full)


@gluon.constexpr_function
def pack_asm(dtype):
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@gluon.jit
def pack(x, like):
    """``x`` rounded to the dtype of ``like``, in pairs; the compiler itself would pair them only at the product."""
    return gl.inline_asm_elementwise(pack_asm(like.dtype), "=r,f,f", [x], like.dtype, True, 2)


@gluon.jit
def inside(lo, length, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Which columns of a product are in their row's interval of ``length`` columns from ``lo`` on.

    A thread holds columns 8 j + 2 l and 8 j + 2 l + 1 for its l and every j. Its l is subtracted from ``lo``, which
    leaves constants in the code instead of a register for every column. A column below ``lo`` is huge as unsigned.
    """
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))[None, :]
    mine = columns & 6
    return (columns - mine - (lo[:, None] - mine)).to(gl.uint32) < length.to(gl.uint32)[:, None]


@gluon.jit
def split(x):
    """Columns of ``x [ROWS, N]`` as ``[ROWS, N / 32, 4, 4, 2]``, of which only the last but one is spread over threads.

    In a product's layout a thread holds columns 8 j + 2 l and 8 j + 2 l + 1 for its l of 0 to 3 and every j. One
    reduction over all columns would be a long chain of dependent instructions in each thread; one dimension after the
    other is as many instructions in short chains.
    """
    return x.reshape([x.shape[0], x.shape[1] // 32, 4, 4, 2])


@gluon.jit
def row_max(x):
    parts = gl.max(gl.max(gl.max(split(x), 1), 1), 2)
    return gl.convert_layout(gl.max(parts, 1), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def row_parts(x):
    """The partial row sums ``[ROWS, 4]`` of the four threads that share each row."""
    return half_parts(split(x))


@gluon.jit
def halves(x):
    """The left and the right half of a product's columns, in the form of `split`."""
    four = x.reshape([x.shape[0], 2, x.shape[1] // 64, 4, 4, 2])
    return gl.split(four.permute((0, 2, 3, 4, 5, 1)))


@gluon.jit
def whole(left, right, like):
    """The inverse of `halves`, in the layout of ``like``."""
    six = gl.join(left, right).permute((0, 5, 1, 2, 3, 4))
    return gl.convert_layout(six.reshape(like.shape), like.type.layout)


@gluon.jit
def half_parts(x):
    """`row_parts` of the result of `split` or `halves`; adjacent elements first, which are ready at the same time."""
    return gl.sum(gl.sum(gl.sum(x, 4), 2), 1)


@gluon.jit
def in_parts(x, like):
    """A value for each row, in the layout of `row_parts`."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.constexpr_function
def rescale_asm(elements):
    """PTX that multiplies a thread's elements, which alternate between two rows, unless no row of the warp has changed.

    Each multiplication has a predicate, because a multiplication that is not executed costs almost no power.
    """
    first, second = f"${2 * elements}", f"${2 * elements + 2}"
    lines = [
        ".reg .pred p, q, any;",
        ".reg .f32 a, b;",
        f"setp.neu.f32 p, {first}, 0f00000000;",
        f"setp.neu.f32 q, {second}, 0f00000000;",
        "or.pred any, p, q;",
        "vote.sync.any.pred any, any, 0xffffffff;",
        "@!any bra DONE;",
        f"ex2.approx.ftz.f32 a, {first};",
        f"ex2.approx.ftz.f32 b, {second};",
        *(f"@{'pq'[n // 2 % 2]} mul.f32 ${n}, ${n}, {'ab'[n // 2 % 2]};" for n in range(elements)),
        "DONE:",
    ]
    return "{" + " ".join(lines) + "}"


@gluon.constexpr_function
def rescale_constraints(elements):
    """Constraints of an in-place operation: outputs, the same registers as inputs, and each element's ``change``."""
    return ",".join(["=f"] * elements + [str(n) for n in range(elements)] + ["f"] * elements)


@gluon.jit
def rescale(acc, change):
    """``acc * exp2(change)[:, None]``, which a warp skips if no row of it has changed.

    In assembly, because a branch in the language is taken by a whole warpgroup, which would have to synchronise.
    """
    COUNT: gl.constexpr = min(64, acc.shape[1] // 2)
    by_row = gl.convert_layout(change, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.inline_asm_elementwise(
        rescale_asm(COUNT), rescale_constraints(COUNT), [acc, by_row], gl.float32, True, COUNT
    )


@gluon.jit
def advance(place, phase, PLACES: gl.constexpr):
    """The next stage of a circular buffer, and the phase of its barriers, which flips in every round."""
    last = place == PLACES - 1
    return gl.where(last, 0, place + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def sync(number, threads):
    """Wait at named barrier ``number`` until ``threads`` threads have arrived, including those that only `arrive`."""
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [number, threads], gl.int32, False, 1)


@gluon.jit
def arrive(number, threads):
    """Arrive at a named barrier without waiting."""
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [number, threads], gl.int32, False, 1)


@gluon.jit
def arrive_after(values, number, same, threads):
    """As `arrive`, but not before the float32 ``values``, one per row, are computed; they are returned.

    ``same`` equals ``number``, but the assembler cannot know it: the barrier is selected by the values.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 n; setp.gt.f32 p, $2, $3; selp.b32 n, $4, $6, p; bar.arrive n, $8; "
        "mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=f,=f,f,f,r,r,r,r,r,r", [values, number, same, threads], gl.float32, False, 2,
    )  # fmt: skip


@gluon.jit
def post(jobs, slot, values):
    """Write a work tile, a tuple of scalars, to shared memory. The caller's barrier makes it visible."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for n in gl.static_range(len(values)):
        jobs.index(slot * len(values) + n).store(gl.full([1], 0, gl.int32, layout=one) + values[n])


@gluon.jit
def read(jobs, slot, SIZE: gl.constexpr, COUNT: gl.constexpr):
    """The first COUNT scalars of a work tile of SIZE scalars."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    values = ()  # of scalars, one after the other
    for n in gl.static_range(COUNT):
        values += (gl.max(jobs.index(slot * SIZE + n).load(one), 0),)  # type: ignore[assignment]
    return values


@gluon.jit
def next_job(counter, programs):
    """The next work tile of a grid of ``programs``, by the atomic counter."""
    return programs + gl.atomic_add(counter, 1)


@gluon.jit
def leave(counter, programs):
    """Called by every program after its last `next_job`; the last program resets the counters to 0."""
    if gl.atomic_add(counter + 1, 1) == programs - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def tanh(x):
    # The language's division also handles divisors below 1; this one is at least 1.
    divisor = gl.exp2(x * (2.0 * LOG2E)) + 1.0
    inverse = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], gl.float32, True, 1)
    return 1.0 - 2.0 * inverse
