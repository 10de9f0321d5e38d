"""Conversion of padded batches to packed documents, and back.

For a causal model that is equivalent: no token sees padding or another sequence. The first token of each sequence gets
no label, because it would be predicted by another sequence.

[Note: shapes] B batch, S padded tokens, N tokens that are not padding, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distflash.integrations.labels import IGNORED

# The keys of a padded batch that can be converted. Others stay padded, and raise later.
_KNOWN = {"input_ids", "labels", "attention_mask"}


def is_padded(batch: Mapping[str, Any]) -> bool:
    """Whether the batch is padded and can be converted."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not batch.keys() <= _KNOWN or not mask.any():
        return False
    return bool((mask == 0).any()) and bool(((mask == 0) | (mask == 1)).all())


def unpadded(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """`without_padding` for a padded batch; others unchanged."""
    return without_padding(batch) if is_padded(batch) else batch


def without_padding(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens ``[1, N]`` of a padded batch ``[B, S]``, with the ``cu_seqlens`` of its sequences.

    Raises:
        ValueError: a padding token has a label.
    """
    kept = batch["attention_mask"].bool()
    lengths = kept.sum(1)
    ends = lengths[lengths > 0].cumsum(0)
    flat = {
        "input_ids": batch["input_ids"][kept][None],
        "cu_seqlens": torch.cat([ends.new_zeros(1), ends]),
    }
    if "dropout_seed" in batch:
        flat["dropout_seed"] = batch["dropout_seed"]
    labels = batch.get("labels")
    if labels is None:
        return flat
    if bool((labels[~kept] != IGNORED).any()):
        raise ValueError(
            f"labels: some stand on padding, where attention_mask is 0, and would count; set them to {IGNORED}"
        )
    labels = labels[kept][None].clone()
    labels[:, flat["cu_seqlens"][:-1]] = IGNORED
    return {**flat, "labels": labels}


def padded_again(x: Tensor, attention_mask: Tensor) -> Tensor:
    """``x [1, N, V]`` as ``[B, S, V]``, zero on padding."""
    whole = x.new_zeros(*attention_mask.shape, *x.shape[2:])
    whole[attention_mask.bool()] = x[0]
    return whole
