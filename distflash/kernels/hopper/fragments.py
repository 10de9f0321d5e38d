"""The memory layout of the dQ accumulator: that of a product's registers, so that adding needs no rearrangement.

[Note: fragment order] A product of ROWS rows and N columns lies in the registers of 4 warps of 32 threads: thread l of
warp w has columns 8 j + 2 (l % 4) + c of rows 16 w + 8 r + l / 4, for c and r of 0 and 1 and every j. In fragment order
the four numbers of a thread and j are consecutive, followed by those of the next thread. So every store of a warp is
512 consecutive bytes, without bank conflicts in shared memory. float32 ``[tiles, PARTS, ROWS, N]`` holds tiles of ROWS
queries, by heads, each as PARTS products with consecutive columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from distflash.kernels.hopper.common import ROWS, product_layout


@gluon.jit
def fragments(x):
    """A product ``[ROWS, N]`` in fragment order, as one row."""
    six = x.reshape([4, 2, 8, x.shape[1] // 8, 4, 2])  # w, r, l / 4, j, l % 4, c
    return six.permute((3, 0, 2, 4, 1, 5)).reshape([ROWS * x.shape[1]])


@gluon.jit
def columns(x, N: gl.constexpr):
    """The inverse of `fragments`: the product ``[ROWS, N]``."""
    six = x.reshape([N // 8, 4, 8, 4, 2, 2])
    return six.permute((1, 4, 2, 0, 3, 5)).reshape([ROWS, N])


@gluon.jit
def places(N: gl.constexpr):
    """0 to ROWS N - 1, spread over threads as `fragments` of a product ``[ROWS, N]`` are."""
    like: gl.constexpr = fragments(gl.zeros([ROWS, N], gl.float32, layout=product_layout(N))).type.layout
    return gl.arange(0, ROWS * N, layout=like)


@gluon.jit
def add(sums, x):
    """Add a product to what stands at ``sums`` in memory, in fragment order."""
    at = sums + places(x.shape[1])
    # Four at a time: the language's own atomic addition takes one.
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; "
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f", [at.to(gl.int64), fragments(x)], gl.int32, False, 4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["queries", "heads"])
def round_kernel(
    sums,  # float32 [B * H * tiles, PARTS, ROWS, N]
    out,  # [B, T, H, D]
    scale, queries, heads,
    D: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """``out = sums * scale``, a tile of one head's queries a program."""
    tile = gl.program_id(0)
    tiles = gl.cdiv(queries, ROWS)
    plane, first = tile // tiles, tile % tiles * ROWS
    batch, head = plane // heads, plane % heads
    rowwise: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, rowwise))
    for part in gl.static_range(PARTS):
        x = gl.load(sums + (tile.to(gl.int64) * PARTS + part) * (ROWS * N) + places(N))
        x = gl.convert_layout((columns(x, N) * scale).to(out.dtype.element_ty), rowwise)
        column = part * N + gl.arange(0, N, layout=gl.SliceLayout(0, rowwise))
        to = ((batch.to(gl.int64) * queries + rows) * heads + head)[:, None] * D + column[None, :]
        gl.store(out + to, x, mask=(rows < queries)[:, None] & (column < D)[None, :])
