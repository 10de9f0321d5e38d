"""Attention dropout: which pairs of a query and a key are dropped, as a function of positions.

Every pair has a random number of 16 bits, which depends on its batch, head, global positions and a seed, and on nothing
else. So all ranks, layouts, schedules and kernels drop the same pairs. Backward drops those of forward, although none
are stored, and a call that is computed again drops the same ones.

The numbers are those of the generator Philox-2x32-7 of Salmon et al. 2011 (https://doi.org/10.1145/2063384.2063405),
with the fewest rounds that pass their statistical tests; FlashAttention's dropout has as many. It maps a counter of two
words and a Philox key of one word to two random words:

- a head's Philox key and offset are ``philox(philox((batch, head), seed_low), seed_high)``;
- ``strip(p)`` is the position p with its bit 3 (of value 8) cleared. The counter of a pair is ``(strip(q) + offset,
  strip(k))``, so four pairs share one. Bit 3 of the query's position selects the first or the second random word, and
  bit 3 of the key's position the low or the high 16 bits of that word.

Four pairs because NVIDIA's matrix instructions have these four in the registers of one thread, in the scores and in
their transpose: see [Note: fragment order] in `kernels.hopper.fragments`.

[Note: shapes] B batch, H query heads, T queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Of Philox-2x32: the multiplier, what is added to the Philox key each round, and the number of rounds.
MULTIPLIER = 0xD256D193
KEY_STEP = 0x9E3779B9
ROUNDS = 7
LEVELS = 1 << 16  # of the random number of a pair

_WORD = 0xFFFFFFFF
_STEP_BITS = 40  # low bits of a seed that hold the training step; the bits above hold the layer, see `of_layer`


@dataclass(frozen=True)
class Dropout:
    """Dropout of a call.

    Attributes:
        threshold: pairs whose random number of 16 bits is below it are dropped; 1 to 65,535.
        seed: int64 ``[]``, on the device of the call, the same on all ranks.
        first_head: which of the call's query heads is head 0 of the tensors, which may hold only some of them.
    """

    threshold: int
    seed: Tensor
    first_head: int = 0

    @property
    def keep_scale(self) -> float:
        """What kept probabilities are multiplied by: one over the share of pairs that are kept."""
        return LEVELS / (LEVELS - self.threshold)

    def of_heads(self, heads: slice) -> Dropout:
        """For query heads from ``heads.start`` on."""
        return replace(self, first_head=self.first_head + (heads.start or 0))

    def kept(self, batch: int, heads: range, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Which pairs are kept: bool ``[B, heads, T, K]``. heads: indices in the tensors."""
        heads_of_call = range(heads.start + self.first_head, heads.stop + self.first_head)
        return numbers(self.seed, batch, heads_of_call, q_positions, k_positions) >= self.threshold


def dropout_mask(
    seed: int | Tensor, p: float, batch: int, heads: int, q_positions: Tensor, k_positions: Tensor
) -> Tensor:
    """Which probabilities `attention` keeps under dropout, on any number of ranks, layout, schedule and kernel.

    Every pair of a query and a key has a random number of the generator Philox-2x32-7 of Salmon et al. 2011
    (https://doi.org/10.1145/2063384.2063405), which depends on the seed, the head, the index in the batch and the two
    global positions. A pair is dropped if its number, of 16 bits, is below
    ``round(p * 2**16)``.

    Args:
        seed: ``dropout_seed`` of the call.
        p: ``dropout_p`` of the call.
        batch, heads: how many sequences and query heads the mask has, from index 0 on.
        q_positions: ``[T]``, global positions of queries.
        k_positions: ``[K]``, global positions of keys, on the same device.

    Returns:
        bool ``[batch, heads, T, K]``, True where the probability is kept. With a `Rows` mask, `attention` concatenates
        the sequences of the batch to one. With ``S`` keys in each, the dropout mask of sequence ``n`` is
        ``dropout_mask(seed, p, 1, heads, q_positions + n * S, k_positions + n * S)``.

    Raises:
        ValueError: ``p`` is no probability below 1, ``seed`` is no seed, or positions are no tensors of integers
            ``[tokens]``.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 6, 2, 8)
        >>> out = df.attention(q, k, v, dropout_p=0.25, dropout_seed=7)
        >>> i = torch.arange(6)
        >>> kept = df.dropout_mask(7, 0.25, 1, 2, i, i)
        >>> probability = (torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5).softmax(-1)
        >>> torch.allclose(out, torch.einsum("bhij,bjhd->bihd", probability * kept / 0.75, v), atol=1e-6)
        True
    """
    if not isinstance(p, int | float) or isinstance(p, bool) or not 0 <= p < 1:
        raise ValueError(f"p: expected a probability of at least 0 and below 1, got {p!r}")
    if not _is_seed(seed):
        raise ValueError(f"seed: expected an int that fits into int64, or an int64 tensor [], got {seed!r}")
    for name, x in (("q_positions", q_positions), ("k_positions", k_positions)):
        if x.dim() != 1 or x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(f"{name}: expected integers [tokens], got {x.dtype} with shape {tuple(x.shape)}")
    device = q_positions.device
    return numbers(as_seed(seed, device), batch, range(heads), q_positions, k_positions) >= threshold_of(p)


def _is_seed(x: object) -> bool:
    return x.dtype == torch.int64 and x.dim() == 0 if isinstance(x, Tensor) else fits_int64(x)


def fits_int64(x: object) -> bool:
    """Whether it is an int, and one that a seed can be."""
    return isinstance(x, int) and not isinstance(x, bool) and -(2**63) <= x < 2**63


def threshold_of(p: float) -> int:
    """The probability ``p`` in steps of 2^-16. 0 for no dropout."""
    return min(round(p * LEVELS), LEVELS - 1)


def in_steps(p: float) -> float:
    """The drop probability really used for ``p``: a multiple of 2^-16."""
    return threshold_of(p) / LEVELS


def dropout_of(p: float, seed: Tensor) -> Dropout | None:
    """Dropout of the probability ``p``; None if that is 0."""
    return Dropout(threshold_of(p), seed) if p else None


def as_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as kernels read it: an int is written to the device without a synchronisation."""
    return seed.resolve_neg() if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def of_layer(seed: int, layer: int) -> int:
    """The seed of a layer in a step: no two layers and steps share one.

    Args:
        seed: of the step, from 0 to 2^40 - 1.
        layer: its number, below 2^23.
    """
    if not isinstance(seed, int) or not 0 <= seed < 1 << _STEP_BITS:
        raise ValueError(f"dropout_seed: expected an int from 0 to 2**{_STEP_BITS} - 1, such as the step, got {seed!r}")
    return seed + (layer << _STEP_BITS)


def numbers(seed: Tensor, batch: int, heads: range, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """The random numbers of pairs, int64 ``[B, H, T, K]``, from 0 to 65,535."""
    device = q_positions.device
    seed = seed.to(device, torch.int64)
    batches = torch.arange(batch, device=device)[:, None]
    key, offset = philox(*philox(batches, torch.arange(heads.start, heads.stop, device=device), seed), seed >> 32)
    key, offset = key[:, :, None, None], offset[:, :, None, None]
    q, k = q_positions.to(torch.int64)[:, None], k_positions.to(torch.int64)[None, :]
    first, second = philox(strip(q) + offset, strip(k), key)
    word = torch.where((q & 8) == 0, first, second)
    return torch.where((k & 8) == 0, word, word >> 16) & (LEVELS - 1)


def strip(position: Tensor) -> Tensor:
    """``position`` with bit 3 set to 0. Two positions that differ in this bit alone share their Philox counters."""
    return position & ~8


def philox(first: Tensor, second: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox-2x32-7 of a counter ``(first, second)``: two words of 32 bits. Of each int64 only the low half is used."""
    first, second, key = first & _WORD, second & _WORD, key & _WORD
    for _ in range(ROUNDS):
        product = first * MULTIPLIER  # all 64 bits are right; read as a signed number it may be negative
        first, second = ((product >> 32) & _WORD) ^ key ^ second, product & _WORD
        key = (key + KEY_STEP) & _WORD
    return first, second
