"""Packed documents in Megatron's layout: each document is sharded over context ranks in a zigzag of its own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from distflash.context import ContextParallel
from distflash.layouts import Layout
from distflash.masks import Documents


@dataclass(frozen=True)
class PerDocument(Layout):
    """Rank r holds chunks ``r`` and ``2W - 1 - r`` of the ``2W`` chunks of every document.

    Args:
        documents: their lengths are multiples of 2W.
    """

    documents: Documents

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        found = []
        for start, stop in pairwise(self.documents.cu_seqlens):
            chunk = (stop - start) // (2 * world_size)
            firsts = (start + rank * chunk, start + (2 * world_size - 1 - rank) * chunk)
            found += [range(first, first + chunk) for first in firsts]
        return tuple(found)

    def count_below(self, positions: Tensor, seq_len: int, world_size: int, rank: int) -> Tensor:
        """As `Layout.count_below`, for all documents at once."""
        inside = positions.clamp(0, seq_len)
        start, stop = self.documents.ends(inside, seq_len)
        chunk, place = torch.div(stop - start, 2 * world_size, rounding_mode="floor"), inside - start
        early = torch.minimum((place - rank * chunk).clamp(min=0), chunk)
        late = torch.minimum((place - (2 * world_size - 1 - rank) * chunk).clamp(min=0), chunk)
        return torch.div(start, world_size, rounding_mode="floor") + early + late


@dataclass(frozen=True)
class Batch:
    """The documents of a packed batch, and the group with their layout."""

    documents: Documents
    cp: ContextParallel


class Batches:
    """Caches packed batches by the tensor of boundaries: the host synchronises once per batch, not once per layer."""

    def __init__(self, cp: ContextParallel) -> None:
        self.cp = cp
        self._known: Any = WeakIdKeyDictionary()

    def of(self, packed: Any, seq_len: int) -> Batch:
        """The batch of a ``PackedSeqParams``. seq_len: the number of tokens over all ranks.

        Raises:
            ValueError: it is not supported.
        """
        padded = packed.cu_seqlens_q_padded
        boundaries = packed.cu_seqlens_q if padded is None else padded
        if (batch := self._known.get(boundaries)) is None:
            documents = Documents(boundaries)
            problem = packed_problem(packed, documents, self.cp.world_size)
            if problem is not None:
                self.cp.refuse(problem, in_attention=True)
            one_rank = self.cp.world_size == 1
            batch = Batch(documents, self.cp if one_rank else self.cp.with_layout(PerDocument(documents)))
            self._known[boundaries] = batch
        if batch.documents.seq_len != seq_len:
            problem = (
                f"packed_seq_params: its documents end at {batch.documents.seq_len}, but the ranks hold {seq_len} "
                "tokens together; count padding as the last document's, or as one of its own"
            )
            self.cp.refuse(problem, in_attention=True)
        return batch


def packed_problem(packed: Any, documents: Documents, world_size: int) -> str | None:
    """Why a ``PackedSeqParams`` is not supported, or None."""
    if packed.qkv_format != "thd":
        return f'packed_seq_params.qkv_format: expected "thd", got {packed.qkv_format!r}'
    if packed.cp_group is not None or packed.local_cp_size is not None:
        return "packed_seq_params.cp_group: groups that change from batch to batch (hybrid CP) are not supported"
    padded = packed.cu_seqlens_q_padded is not None
    others = packed.cu_seqlens_kv_padded if padded else packed.cu_seqlens_kv
    if others is not None and Documents(others) != documents:
        return "packed_seq_params: keys have other boundaries than queries; only self-attention is supported"
    lengths = [stop - start for start, stop in pairwise(documents.cu_seqlens)]
    if world_size > 1 and any(length % (2 * world_size) for length in lengths):
        return (
            f"packed_seq_params: documents of {lengths[:8]} tokens, of which each must be a multiple of twice the "
            f"context ranks, {2 * world_size}, since Megatron cuts each document into that many chunks; pad them "
            "(cu_seqlens_q_padded)"
        )
    return None
