"""Shifting of labels before the sequence is sharded, and digests to compare batches over ranks.

[Note: shapes] B batch, S global tokens.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from distflash.masks import Documents

# The label that losses ignore by default, in torch and in Transformers.
IGNORED = -100


def shift(x: Tensor, by: int = 1, documents: Documents | None = None, fill: int = IGNORED) -> Tensor:
    """Shift values ``by`` tokens to the left, ``[B, S] -> [B, S]``: a label is then at the token that predicts it.

    Args:
        x: tokens or labels of unsharded sequences, integers.
        by: the number of tokens, 0 or more.
        documents: packed documents, across whose ends nothing is shifted; None for one document.
        fill: the value at the end of each document.
    """
    S = x.shape[1]
    moved = F.pad(x, (0, by), value=fill)[:, by:]
    if documents is None:
        return moved
    positions = torch.arange(S, device=x.device)
    return moved.masked_fill(positions + by >= documents.ends(positions, S)[1], fill)


def are_tokens(labels: Tensor, tokens: Tensor, ignored: int = IGNORED) -> bool:
    """Whether labels ``[B, S]`` are clearly the tokens themselves (unshifted), not the tokens that follow."""
    return _equal(labels, tokens, ignored) and not _follow(labels, tokens, ignored)


def are_shifted(labels: Tensor, tokens: Tensor, ignored: int = IGNORED) -> bool:
    """Whether labels ``[B, S]`` plainly are the tokens that follow, not the tokens themselves."""
    return _follow(labels, tokens, ignored) and not _equal(labels, tokens, ignored)


def _follow(labels: Tensor, tokens: Tensor, ignored: int) -> bool:
    return _equal(labels[:, :-1], tokens[:, 1:], ignored)


def _equal(labels: Tensor, tokens: Tensor, ignored: int) -> bool:
    return bool(((labels == tokens) | (labels == ignored)).all())


def digest(*tensors: Tensor) -> str:
    """A digest of tensors, their shapes and dtypes."""
    made = hashlib.blake2b(digest_size=7)
    for x in tensors:
        made.update(f"{x.dtype} {tuple(x.shape)}".encode())
        made.update(x.detach().cpu().contiguous().numpy().tobytes())
    return made.hexdigest()
