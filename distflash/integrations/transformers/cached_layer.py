"""One layer of a `ShardedCache`.

In Transformers a layer passes its new keys to the cache, and attention gets what the cache returns. Here the cache
returns the new keys unchanged, tagged with their `CachedLayer`. distflash's attention appends them and attends.

[Note: shapes] B batch, n new tokens, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from distflash.api import attention
from distflash.cache import Cache
from distflash.chunks import seen_later
from distflash.context import ContextParallel
from distflash.decode_step import MOST_TOKENS, decode
from distflash.mask_algebra import Mask
from distflash.resizing import resized

# Least spare capacity, in tokens.
_SLACK = 128
# A cache that is full grows by 1 / _SHARE of its capacity, so that copies are rare and little memory is unused.
_SHARE = 8
_MARK = "distflash_layer"
_NOT_ATTENDED = (
    "past_key_values: a layer has handed its keys to the ShardedCache, and its attention was not distflash's: it has "
    'seen its new tokens only. Give the model attn_implementation="distflash" after register(cp)'
)


@dataclass
class Sequences:
    """State that a cache and its layers share.

    Attributes:
        cp: the group of the cache.
        capacity: the most tokens of a sequence, or None.
        expected: how many tokens per sequence are known to come.
        batch: the number of sequences; 0 before the first forward.
        padding: for each sequence, the number of padding tokens on its left, which are not stored.
        row: the only sequence of the current forward, or None for all.
        first: the index of the first layer with keys, if any.
        starts: the lengths of the sequences in that layer before the current forward.
        checked: whether the current forward's tokens have been checked to be the next ones.
        prompt: int64 ``[B, S]``, the last prefill, with which later turns must begin; None if unknown.
        generated: the ``input_ids`` of ``generate`` that were last compared with it.
    """

    cp: ContextParallel
    capacity: int | None
    expected: int = 0
    batch: int = 0
    padding: tuple[int, ...] = ()
    row: int | None = None
    first: int | None = None
    starts: tuple[int, ...] = ()
    checked: bool = False
    prompt: Tensor | None = None
    generated: Tensor | None = None


class CachedLayer(CacheLayerMixin):
    """A layer's `Cache`, allocated with its first keys and reallocated when it is full."""

    is_croppable = True
    is_sliding = False

    def __init__(self, sequences: Sequences) -> None:
        super().__init__()
        self.sequences = sequences
        self.cache: Cache | None = None
        self.awaits_attention = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is allocated later, when the mask is known."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return new keys and values ``[B, G, n, D]`` unchanged; attention will append them."""
        self.require_attended()
        self.awaits_attention = True
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def require_attended(self) -> None:
        """Raise if the last keys were not followed by distflash's attention."""
        if self.awaits_attention:
            self.awaits_attention = False
            raise ValueError(_NOT_ATTENDED)

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, seq_len: int | None, **scores: Any) -> Tensor:
        """Append the new tokens, and attend to the whole cache.

        Args:
            q, k, v: ``[B, n, heads, D]``.
            seq_len: the chunk's length, of which these are this rank's part; None if every rank has the same tokens.
            scores: keyword arguments of `attention` and `decode`.
        """
        cp = self.sequences.cp
        cache = self._with_room_for(k.shape[1] if seq_len is None else seq_len, k, v, mask)
        if seq_len is None:
            return decode(q, k, v, cache=cache, mask=mask, **scores)
        return attention(q, k, v, cache=cache, mask=mask, cp=cp, seq_len=seq_len, **scores)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each sequence of the current forward, without padding."""
        if self.cache is None:
            return (0,) * (1 if self.sequences.row is not None else self.sequences.batch)
        return self._chosen(self.cache).lengths

    def get_seq_length(self) -> int:
        """The length of the first sequence, including padding."""
        first = self.lengths[0] if self.lengths else 0
        padding = self.sequences.padding
        return first + (padding[0] if padding and self.sequences.row is None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of the mask matrix, which is never materialised."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit that Transformers has to know."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, for example rejected drafts. tokens_to_remove: their number, negated."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected the number of tokens with a minus, got {tokens_to_remove}")
        if self.cache is not None and tokens_to_remove:
            self.cache.truncate([max(0, length + tokens_to_remove) for length in self.cache.lengths])

    def reorder_cache(self, beam_idx: Any) -> None:
        """Replace sequence n by sequence ``beam_idx[n]``."""
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def batch_select_indices(self, indices: Sequence[int]) -> None:
        """Select sequences, with repetition, in this order."""
        if self.cache is not None:
            self.cache = resized(self.cache, self.cache.capacity, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, as `torch.repeat_interleave`."""
        if self.cache is not None:
            self.batch_select_indices([n for n in range(self.cache.batch) for _ in range(repeats)])

    def reset(self) -> None:
        """Drop all tokens, and free the memory."""
        self.cache, self.awaits_attention = None, False

    def _chosen(self, cache: Cache) -> Cache:
        return cache if self.sequences.row is None else cache[self.sequences.row]

    def _with_room_for(self, tokens: int, k: Tensor, v: Tensor, mask: Mask) -> Cache:
        """The cache of the forward's sequences. If full, keys that no later token sees are dropped, then it grows."""
        if self.cache is None:
            self.cache = Cache(
                self.sequences.cp,
                batch=self.sequences.batch,
                kv_heads=k.shape[2],
                d_qk=k.shape[3],
                d_v=v.shape[3],
                capacity=self._capacity(mask, 0, tokens),
                dtype=k.dtype,
                device=k.device,
            )
        cache = self._chosen(self.cache)
        if cache.is_full_with(tokens):
            stay = max(sum(cache.fewer(ledger, mask).counts) for ledger in cache.ledgers())
            if stay + tokens > self.cache.capacity:
                capacity = max(self.cache.capacity, self._capacity(mask, stay, tokens))
                self.cache = resized(self.cache, capacity)
        return self._chosen(self.cache)

    def _capacity(self, mask: Mask, stay: int, tokens: int) -> int:
        """The new capacity for ``tokens`` besides those that ``stay``, limited by the user's capacity."""
        held, most = 0 if self.cache is None else self.cache.capacity, self.sequences.capacity
        expected = max(self.sequences.expected, held)
        seen = sum(map(len, seen_later(mask, expected)))
        if seen < expected:  # later tokens do not see all keys
            wanted = max(seen, stay) + max(tokens, _SLACK)
            return wanted if most is None else min(wanted, most)
        return max(expected + _SLACK, stay + tokens, held + held // _SHARE) if most is None else most


def layer_of(key: Tensor) -> CachedLayer | None:
    """The layer of a `ShardedCache` that returned this tensor, or None."""
    return getattr(key, _MARK, None)


def too_many_tokens(tokens: int) -> str | None:
    """Check that ``tokens`` new tokens, the same on every rank, are not too many."""
    if tokens <= MOST_TOKENS:
        return None
    return (
        f"input_ids: {tokens} tokens that the ShardedCache has not had, on every rank; expected at most {MOST_TOKENS}. "
        "Call cache.prefill(model, input_ids) first, which spreads a prompt over the ranks"
    )
