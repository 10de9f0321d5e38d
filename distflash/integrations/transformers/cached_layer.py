"""One layer's keys and values as the library's caches have them, over a group of ranks.

The library lets a layer hand its new keys to the cache and then calls the attention with what the cache returns. Here
that is the new keys as they are, marked with the `CachedLayer` they belong to. The attention appends them and attends.

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
from distflash.masks import Mask
from distflash.resizing import resized

# Room for so many tokens more than are known to come, at least.
_SLACK = 128
# A cache that has become too small grows by this part of itself: copies are few, and little memory is not used.
_SHARE = 8
_MARK = "distflash_layer"
_NOT_ATTENDED = (
    "past_key_values: a layer has handed its keys to the ShardedCache, and its attention was not distflash's: it has "
    'seen its new tokens only. Give the model attn_implementation="distflash" after register(cp)'
)


@dataclass
class Sequences:
    """What a cache and its layers have in common.

    Attributes:
        cp: the group of the cache.
        capacity: how many tokens of a sequence there may be, or None.
        expected: how many tokens of a sequence are known to come.
        batch: how many sequences there are; 0 before the first.
        padding: how many tokens of padding each one has had on its left; they are not kept.
        row: the one sequence that a forward is about, or None for all.
        first: the first layer that has keys, by its number, if any has.
        starts: how many tokens the sequences of this forward had in that layer before it.
        checked: whether this forward's tokens are known to be those that come next.
        prompt: int64 ``[B, S]``, what was prefilled last, with which a later turn has to begin; None if not known.
        generated: the ``input_ids`` of the ``generate`` that were last compared with it.
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
    """A layer's `Cache`, made at its first keys, and made anew where it has to be larger."""

    is_croppable = True
    is_sliding = False

    def __init__(self, sequences: Sequences) -> None:
        super().__init__()
        self.sequences = sequences
        self.cache: Cache | None = None
        self.awaits_attention = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is allocated where the mask is known."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """New keys and values ``[B, G, n, D]`` as they are, for the attention to keep."""
        self.require_attended()
        self.awaits_attention = True
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def require_attended(self) -> None:
        """Raise where the last keys have been handed over, and no attention of distflash came."""
        if self.awaits_attention:
            self.awaits_attention = False
            raise ValueError(_NOT_ATTENDED)

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, seq_len: int | None, **scores: Any) -> Tensor:
        """Append the new tokens, and attend to all that is kept.

        Args:
            q, k, v: ``[B, n, heads, D]``.
            seq_len: the tokens of the chunk of which these are this rank's part; None where every rank has all of them.
            scores: of `attention` and `decode` alike.
        """
        cp = self.sequences.cp
        cache = self._with_room_for(k.shape[1] if seq_len is None else seq_len, k, v, mask)
        if seq_len is None:
            return decode(q, k, v, cache=cache, mask=mask, **scores)
        return attention(q, k, v, cache=cache, mask=mask, cp=cp, seq_len=seq_len, **scores)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens, without padding, each sequence of a forward has had."""
        if self.cache is None:
            return (0,) * (1 if self.sequences.row is not None else self.sequences.batch)
        return self._chosen(self.cache).lengths

    def get_seq_length(self) -> int:
        """How many tokens there have been, with the padding of a batch that is decoded together."""
        first = self.lengths[0] if self.lengths else 0
        padding = self.sequences.padding
        return first + (padding[0] if padding and self.sequences.row is None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the library's matrix, which nobody makes."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: none, as far as the library is concerned."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many of the last tokens, given as a number of at most 0: drafts that were rejected."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected the number of tokens with a minus, got {tokens_to_remove}")
        if self.cache is not None and tokens_to_remove:
            self.cache.truncate([max(0, length + tokens_to_remove) for length in self.cache.lengths])

    def reorder_cache(self, beam_idx: Any) -> None:
        """Sequence n becomes what sequence ``beam_idx[n]`` was."""
        if self.cache is not None:
            self.cache.reorder(beam_idx)

    def batch_select_indices(self, indices: Sequence[int]) -> None:
        """Keep some of the sequences, also more than once, in this order."""
        if self.cache is not None:
            self.cache = resized(self.cache, self.cache.capacity, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times, one behind the other."""
        if self.cache is not None:
            self.batch_select_indices([n for n in range(self.cache.batch) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget everything, and free the memory."""
        self.cache, self.awaits_attention = None, False

    def _chosen(self, cache: Cache) -> Cache:
        return cache if self.sequences.row is None else cache[self.sequences.row]

    def _with_room_for(self, tokens: int, k: Tensor, v: Tensor, mask: Mask) -> Cache:
        """The cache of the forward's sequences. Keys that no later token sees are dropped before it is made larger."""
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
        """Where ``tokens`` do not fit beside those that ``stay``: at least what they need, if that is allowed."""
        held, most = 0 if self.cache is None else self.cache.capacity, self.sequences.capacity
        expected = max(self.sequences.expected, held)
        seen = sum(map(len, seen_later(mask, expected)))
        if seen < expected:  # the mask forgets
            wanted = max(seen, stay) + max(tokens, _SLACK)
            return wanted if most is None else min(wanted, most)
        return max(expected + _SLACK, stay + tokens, held + held // _SHARE) if most is None else most


def layer_of(key: Tensor) -> CachedLayer | None:
    """The layer of a `ShardedCache` that was handed this tensor, if any was."""
    return getattr(key, _MARK, None)


def too_many_tokens(tokens: int) -> str | None:
    """Why every rank cannot have so many new tokens."""
    if tokens <= MOST_TOKENS:
        return None
    return (
        f"input_ids: {tokens} tokens that the ShardedCache has not had, on every rank; expected at most {MOST_TOKENS}. "
        "Call cache.prefill(model, input_ids) first, which spreads a prompt over the ranks"
    )
