"""Which probabilities of a tile are dropped: the numbers of `distflash.dropout`, computed in registers.

If positions within a tile are consecutive and start at a multiple of 16 (IN_TILES), bit 3 of a position is that of its
row or column. A product's layout has the four pairs that share a counter of Philox, whose rows and columns differ in
that bit, in one thread, [Note: fragment order] in `fragments`. So Philox is computed for a quarter of the tile, with
half of its rows and columns, and nothing moves between threads. Otherwise (ANYWHERE) it is computed for each pair.

[Note: shapes] as in `common`. Positions are int32 ``[T]`` and ``[K]``. ``at`` is what `positions` returns, ``q_at``
of queries, ``k_at`` of keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from distflash import dropout
from distflash.kernels.hopper.common import ROWS

IN_TILES = gl.constexpr(1)
ANYWHERE = gl.constexpr(2)
MULTIPLIER = gl.constexpr(dropout.MULTIPLIER)
KEY_STEP = gl.constexpr(dropout.KEY_STEP)
ROUNDS = gl.constexpr(dropout.ROUNDS)


@gluon.jit
def philox(first, second, key):
    """Philox-2x32 of a counter of two words; all are uint32."""
    for _ in gl.static_range(ROUNDS):
        product = first.to(gl.uint64) * MULTIPLIER
        first, second = (product >> 32).to(gl.uint32) ^ key ^ second, product.to(gl.uint32)
        key += KEY_STEP
    return first, second


@gluon.jit
def key_and_offset(seed, plane, heads, heads_before):
    """The Philox key and the offset of a head, see `distflash.dropout`. plane: batch * heads + head."""
    value = gl.load(seed)
    batch = (plane // heads).to(gl.uint32)
    first, second = philox(batch, (heads_before + plane % heads).to(gl.uint32), value.to(gl.uint32))
    return philox(first, second, (value >> 32).to(gl.uint32))


@gluon.jit
def positions(source, start, stop, COUNT: gl.constexpr, layout: gl.constexpr, DROPOUT: gl.constexpr):
    """Positions of COUNT tokens from ``start`` on; IN_TILES only the first one's. 0 outside of the tensor."""
    if DROPOUT == IN_TILES:
        return gl.load(source + start, mask=(start >= 0) & (start < stop), other=0)
    else:
        at = start + gl.arange(0, COUNT, layout=layout)
        return gl.load(source + at, mask=(at >= 0) & (at < stop), other=0)


@gluon.constexpr_function
def quarter(columns):
    """The layout of a quarter of a product: of the rows and columns whose bit 3 is 0, each thread's own ones."""
    registers = [[0, 1]] + [[0, n] for n in (8, 16, 32, 64) if n < columns // 2]
    lanes, warps = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [ROWS.value // 2, columns // 2])


@gluon.jit
def strips(at, dim: gl.constexpr, COUNT: gl.constexpr, COLUMNS: gl.constexpr, DROPOUT: gl.constexpr):
    """The strips of a product's rows (``dim`` 1) or columns (0), uint32: of COUNT, or of half of them IN_TILES."""
    if DROPOUT == IN_TILES:
        n = gl.arange(0, COUNT // 2, layout=gl.SliceLayout(dim, quarter(COLUMNS)))
        return (at + ((n >> 3 << 4) | (n & 7))).to(gl.uint32)
    else:
        return (at & ~8).to(gl.uint32)


@gluon.jit
def whole(first, second, TRANSPOSED: gl.constexpr, like):
    """Of the words of a quarter the number of each pair of a product, in the upper half of 32 bits."""
    if TRANSPOSED:  # the column, which is the query, selects the word, and the row selects its half
        upper, lower = gl.join(first << 16, second << 16), gl.join(first, second)
    else:
        upper, lower = gl.join(first << 16, first), gl.join(second << 16, second)
    six = gl.join(upper, lower).reshape([4, 8, like.shape[1] // 16, 8, 2, 2])
    return gl.convert_layout(six.permute((0, 5, 1, 2, 4, 3)).reshape(like.shape), like.type.layout)


@gluon.jit
def kept(q_at, q_strip, k_at, k_strip, key, threshold, like, TRANSPOSED: gl.constexpr, DROPOUT: gl.constexpr):
    """Which pairs of a product ``like [queries, keys]``, or of its transpose, are kept. q_strip has the offset."""
    rows: gl.constexpr = 0 if TRANSPOSED else 1
    q_strip, k_strip = gl.expand_dims(q_strip, rows), gl.expand_dims(k_strip, 1 - rows)
    first, second = philox(q_strip, k_strip, key)
    if DROPOUT == IN_TILES:
        word = whole(first, second, TRANSPOSED, like)
    else:
        word = gl.where((gl.expand_dims(q_at, rows) & 8) == 0, first, second)
        word = gl.where((gl.expand_dims(k_at, 1 - rows) & 8) == 0, word << 16, word)
    return word >= (threshold.to(gl.uint32) << 16)


@gluon.jit
def thinned(p, sloped, start, k_at, plane, dropping, DROPOUT: gl.constexpr):
    """P^T ``[keys, queries]`` and ``sloped``, both negative where they are dropped.

    The sign says it to `score_gradient` without another register, and `rounded` makes it 0.

    Args:
        p, sloped: P^T, and P^T times the slope of a softcap.
        start, plane: the first query, and batch * heads + head.
        k_at: of the tile's keys.
        dropping: the kernel's arguments.
    """
    if DROPOUT != 0:
        seed, heads_before, threshold, _, q_positions, queries, heads = dropping
        N: gl.constexpr = p.shape[1]
        key, offset = key_and_offset(seed, plane, heads, heads_before)
        q_at = positions(q_positions, start, queries, N, gl.SliceLayout(0, p.type.layout), DROPOUT)
        q_strip, k_strip = strips(q_at, 0, N, N, DROPOUT) + offset, strips(k_at, 1, ROWS, N, DROPOUT)
        keep = kept(q_at, q_strip, k_at, k_strip, key, threshold, p, True, DROPOUT)
        p, sloped = gl.where(keep, p, -p), gl.where(keep, sloped, -sloped)
    return p, sloped


@gluon.jit
def score_gradient(sloped, dp, delta, dropping, DROPOUT: gl.constexpr):
    """dS^T; with dropout divided by the keep scale, which dQ and dK are multiplied by in the end."""
    if DROPOUT != 0:
        delta = delta * (1.0 / dropping[3])
        return gl.maximum(sloped, 0.0) * dp - gl.abs(sloped) * delta[None, :]
    else:
        return sloped * (dp - delta[None, :])


@gluon.constexpr_function
def pack_asm(dtype):
    return f"cvt.rn.relu.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@gluon.jit
def rounded(p, like, DROPOUT: gl.constexpr):
    """P^T in the dtype of ``like``, 0 where it is negative."""
    if DROPOUT != 0:
        return gl.inline_asm_elementwise(pack_asm(like.dtype), "=r,f,f", [p], like.dtype, True, 2)
    else:
        return p.to(like.dtype)


@gluon.jit
def keys_at(k_positions, first, keys, layout: gl.constexpr, DROPOUT: gl.constexpr):
    """The positions of a block's ROWS keys, which are the rows of a product."""
    if DROPOUT != 0:
        return positions(k_positions, first, keys, ROWS, gl.SliceLayout(1, layout), DROPOUT)
    else:
        return 0
