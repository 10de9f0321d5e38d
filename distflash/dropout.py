"""Attention dropout: which pairs of a query and a key are dropped, as a function of positions.

Every pair has a random number of 16 bits, which depends on its batch, head, global positions and a seed, and on nothing
else. So all ranks, layouts, schedules and kernels drop the same pairs, backward finds those of forward without a mask
in memory, and a call that is computed again drops the same ones.

The numbers are those of the generator Philox-2x32-7 of Salmon et al. 2011 (https://doi.org/10.1145/2063384.2063405),
with the fewest rounds that pass their statistical tests; FlashAttention's dropout has as many. It maps a counter of two
words and a key of one word to two random words:

- the key and the offset of a head are ``philox(philox((batch, head), seed_low), seed_high)``;
- four pairs share one counter, ``(strip(query) + offset, strip(key))``: positions that differ in bit 3 only are in one
  strip. Bit 3 of the query selects one of the two words, bit 3 of the key one of its halves.

Four pairs because NVIDIA's matrix instructions have these four in the registers of one thread, in the scores and in
their transpose: see [Note: fragment order] in `kernels.hopper.fragments`.

[Note: shapes] B batch, H query heads, T queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Of Philox-2x32: the multiplier, the step of the key, and the number of rounds.
MULTIPLIER = 0xD256D193
KEY_STEP = 0x9E3779B9
ROUNDS = 7
LEVELS = 1 << 16  # of the random number of a pair

_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """Dropout of a call.

    Attributes:
        threshold: pairs whose random number of 16 bits is below it are dropped; 1 to 65,535.
        seed: int64 ``[]``, on the device of the call, the same on all ranks.
        first_head: the index of the first query head of the tensors among all heads of the call.
    """

    threshold: int
    seed: Tensor
    first_head: int = 0

    @property
    def keep_scale(self) -> float:
        """What kept probabilities are multiplied by: one over the share of pairs that are kept."""
        return LEVELS / (LEVELS - self.threshold)

    def of_heads(self, heads: slice) -> Dropout:
        """That of the tensors' query heads from ``heads.start`` on."""
        return replace(self, first_head=self.first_head + (heads.start or 0))

    def kept(self, batch: int, heads: range, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Which pairs are kept: bool ``[B, heads, T, K]``. heads: of the tensors, so from 0 on."""
        heads_of_call = range(heads.start + self.first_head, heads.stop + self.first_head)
        return numbers(self.seed, batch, heads_of_call, q_positions, k_positions) >= self.threshold


def threshold_of(p: float) -> int:
    """The probability ``p`` in steps of 2^-16. 0 for no dropout."""
    return min(round(p * LEVELS), LEVELS - 1)


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
    """The first position of a strip: a position with its bit 3 cleared."""
    return position & ~8


def philox(first: Tensor, second: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox-2x32-7 of a counter ``(first, second)`` under a key: words, in int64, of which 32 bits are read."""
    first, second, key = first & _WORD, second & _WORD, key & _WORD
    for _ in range(ROUNDS):
        product = first * MULTIPLIER  # its 64 bits, though the sign may be wrong
        first, second = ((product >> 32) & _WORD) ^ key ^ second, product & _WORD
        key = (key + KEY_STEP) & _WORD
    return first, second
