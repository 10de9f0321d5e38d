"""Device functions of attention dropout: which pairs of a tile are kept. The definition is `distflash.dropout`.

``dropout`` of a kernel is ``(seed, threshold, first_head)`` as in `Dropout`, the seed as a pointer; None for none.

[Note: shapes] as in `common`.
"""

import triton
import triton.language as tl

from distflash import dropout as definition

MULTIPLIER = tl.constexpr(definition.MULTIPLIER)
KEY_STEP = tl.constexpr(definition.KEY_STEP)
ROUNDS = tl.constexpr(definition.ROUNDS)
LEVELS = tl.constexpr(definition.LEVELS)


@triton.jit
def keep_share(dropout):
    """The share of pairs that are kept, exactly."""
    return 1.0 - tl.cast(dropout[1], tl.float32) * (1.0 / LEVELS)


@triton.jit
def stream_of(dropout, batch, head):
    """What `kept` needs to know of a head: the key and the offset of its random numbers, and the threshold.

    Fourth, a float32 zero that the compiler does not know to be one, for dropped probabilities. It would move a choice
    between the probability and 0 behind the rounding to 16 bits, where it takes twice the instructions.
    """
    # Casts, since triton makes a constant of a 1 in a tuple.
    seed, threshold = tl.load(dropout[0]), tl.cast(dropout[1], tl.int32)
    batch, head = batch.to(tl.uint32), (head + dropout[2]).to(tl.uint32)
    key, offset = philox(batch, head, seed.to(tl.uint32))
    key, offset = philox(key, offset, (seed >> 32).to(tl.uint32))
    return key, offset, threshold.to(tl.uint32), (threshold // LEVELS).to(tl.float32)


@triton.jit
def places(positions, start, length, ROWS: tl.constexpr, AXIS: tl.constexpr, IN_TILES: tl.constexpr):
    """The strips of ``ROWS`` positions from ``start`` on, and their bits 3, along one axis of a tile of scores.

    IN_TILES: that these are consecutive from a multiple of 16 on. Then the compiler sees which of them share a strip,
    and computes the random numbers of a strip once.
    """
    if IN_TILES:
        # Bit 3 has an axis of its own, along which the strips are the same registers. From ``tl.arange(0, ROWS)`` the
        # compiler removes it by a mask, and then finds only two thirds of the equal ones.
        blocks = tl.arange(0, ROWS // 16)[:, None, None]
        inner = blocks * 16 + tl.arange(0, 8)[None, None, :]
        strips = tl.load(positions + start) + tl.broadcast_to(inner, ROWS // 16, 2, 8).reshape(ROWS)
        upper = tl.broadcast_to(tl.arange(0, 2)[None, :, None], ROWS // 16, 2, 8).reshape(ROWS)
    else:
        rows = start + tl.arange(0, ROWS)
        position = tl.load(positions + rows, mask=rows < length, other=0)
        strips = position & ~8
        upper = position & 8
    return tl.expand_dims(strips.to(tl.uint32), 1 - AXIS), tl.expand_dims(upper != 0, 1 - AXIS)


@triton.jit
def kept(stream, q_places, k_places):
    """Which pairs of a tile are kept. The places must broadcast against each other."""
    key, offset, threshold, _ = stream
    first, second = philox(q_places[0] + offset, k_places[0], key)
    word = tl.where(q_places[1], second, first)
    # The 16 bits that count are compared in the upper half of a word: one instruction less than in the lower.
    return tl.where(k_places[1], word, word << 16) >= threshold << 16


@triton.jit
def philox(first, second, key):
    """Philox-2x32-7 of a counter ``(first, second)`` under a key, all uint32 and broadcast against each other."""
    for _ in tl.static_range(ROUNDS):
        product = first.to(tl.uint64) * MULTIPLIER
        first, second = (product >> 32).to(tl.uint32) ^ key ^ second, product.to(tl.uint32)
        key += KEY_STEP
    return first, second
