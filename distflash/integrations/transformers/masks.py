"""The mask that a model requests from Transformers, as a `Mask`, or the reason why there is none.

A model requests masks of all kinds at the start of its forward, even unused ones. So an unsupported mask raises in the
first layer that gets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from distflash.integrations.transformers.batch import OUR_CACHE, PASS_ALL, Misuse, Shard
from distflash.integrations.transformers.mask_functions import BlocksSource, MaskFunction, NotReadable, read_mask
from distflash.mask_algebra import And, Mask, Or
from distflash.masks import Chunked, Documents

_OWN_ATTENTION = (
    "attention: a layer of this model computes on the attention mask itself, so that its attention is not the "
    "library's, which distflash takes the place of. The model is not supported"
)
_PARTS_BLOCKS = (
    "mask: the model makes blocks (of images, or of a prefix) from the types of {} tokens, but the sequence has {}; "
    'give it the types of all tokens: shard_batch(batch, cp, whole=("token_type_ids",))'
)
_SPLIT_BLOCK = (
    "mask: tokens before {} and from {} on see each other as one block (as images, or as a prefix), and those in "
    "between do not, which is not supported. Blocks have to be contiguous within a document"
)


@dataclass(frozen=True)
class LayerMask:
    """A layer's mask: either `mask`, or `problem`, the reason why there is none.

    Using it as a tensor raises, except for its shape, by which Transformers recognises finished masks.

    uncached: why it is invalid without a ShardedCache, or None. blocks: the sources of the mask's blocks. shape: of the
    mask matrix that it replaces.
    """

    mask: Mask | None = None
    problem: str | None = None
    uncached: str | None = None
    blocks: tuple[BlocksSource, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def ndim(self) -> int:
        """Of the mask matrix."""
        return len(self.shape)

    def problem_with(self, shard: Shard) -> str | None:
        """Check that this is the mask of the whole batch of ``shard``."""
        for blocks in self.blocks:
            if blocks.seq_len != shard.seq_len:
                return _PARTS_BLOCKS.format(blocks.seq_len, shard.seq_len)
            if blocks.apart and (split := _split_block(blocks, shard.documents)) is not None:
                return _SPLIT_BLOCK.format(*split)
        return None

    def within(self, documents: Documents | None) -> Mask:
        """The mask within each packed document."""
        assert self.mask is not None
        return self.mask if documents is None else _restarted(self.mask, documents) & documents

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and torch.compile look for such attributes
            raise AttributeError(name)
        raise Misuse(self.problem or self.uncached or _OWN_ATTENTION)

    def __getitem__(self, _: Any) -> Any:
        raise Misuse(self.problem or self.uncached or _OWN_ATTENTION)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        raise Misuse(next(x.problem or x.uncached for x in given if isinstance(x, cls)) or _OWN_ATTENTION)


def _split_block(blocks: BlocksSource, documents: Documents | None) -> tuple[int, int] | None:
    """The first gap within a block in which no document ends, or None."""
    ends = (0,) if documents is None else documents.cu_seqlens
    last = 0  # ends[last] is the last end up to `start`
    for stop, start in blocks.apart:
        while last + 1 < len(ends) and ends[last + 1] <= start:
            last += 1
        if ends[last] < stop:
            return stop, start
    return None


def _restarted(mask: Mask, documents: Documents) -> Mask:
    """The mask with positions counted within each document, which only chunks depend on."""
    match mask:
        case And(first, second):
            return _restarted(first, documents) & _restarted(second, documents)
        case Or(first, second):
            return _restarted(first, documents) | _restarted(second, documents)
        case Chunked(size):
            ends = documents.cu_seqlens
            return Documents([*(at for start, end in pairwise(ends) for at in range(start, end, size)), ends[-1]])
    return mask


def describe_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    attention_mask: Tensor | LayerMask | None = None,
    **_: Any,
) -> LayerMask:
    """The mask function in Transformers' registry.

    attention_mask: a `LayerMask` if an enclosing model has made it already; it is returned.
    """
    if isinstance(attention_mask, LayerMask):
        return attention_mask
    shape = (batch_size, 1, q_length, kv_length)
    uncached = None
    if kv_length != q_length:
        uncached = (
            f"attention_mask: {kv_length} keys for {q_length} queries; a KV cache is not supported, except "
            f"{OUR_CACHE}, and a mask of the whole sequence has no place here: {PASS_ALL}"
        )
    elif attention_mask is not None and not bool(attention_mask.all()):
        uncached = f"attention_mask: has zeros; padding is not supported: {PASS_ALL}"
    try:
        mask, blocks = read_mask(mask_function)
    except NotReadable as reason:
        # Without attention_mask Transformers looks for packed documents in the positions of this rank's tokens.
        hint = f". attention_mask was left out of the call: {PASS_ALL}" if attention_mask is None else ""
        return LayerMask(problem=uncached or f"{reason}{hint}", shape=shape)
    return LayerMask(mask, uncached=uncached, blocks=blocks, shape=shape)
