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
def tanh(x):
    return 1.0 - 2.0 / (gl.exp2(x * (2.0 * LOG2E)) + 1.0)
