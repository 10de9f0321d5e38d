"""Labels, which are shifted in the whole sequence before it is sharded; and digests, by which ranks compare batches.

[Note: shapes] B batch, S global tokens.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from distflash.masks import Documents

# What losses leave out by default, in torch as in Transformers.
IGNORED = -100


def shift(x: Tensor, by: int = 1, documents: Documents | None = None, fill: int = IGNORED) -> Tensor:
    """Each value ``by`` tokens earlier, ``[B, S] -> [B, S]``: a label then stands at the token that predicts it.

    Args:
        x: tokens or labels of whole sequences, integers.
        by: by how many tokens, 0 or more.
        documents: where documents end that nothing is to leave; None for one document.
        fill: what stands where there is nothing to shift: at the end of each document.
    """
    S = x.shape[1]
    moved = F.pad(x, (0, by), value=fill)[:, by:]
    if documents is None:
        return moved
    positions = torch.arange(S, device=x.device)
    return moved.masked_fill(positions + by >= documents.ends(positions, S)[1], fill)


def are_tokens(labels: Tensor, tokens: Tensor, ignored: int = IGNORED) -> bool:
    """Whether labels ``[B, S]`` plainly are the tokens themselves, not those that follow."""
    return _equal(labels, tokens, ignored) and not _follow(labels, tokens, ignored)


def are_shifted(labels: Tensor, tokens: Tensor, ignored: int = IGNORED) -> bool:
    """Whether labels ``[B, S]`` plainly are the tokens that follow, not the tokens themselves."""
    return _follow(labels, tokens, ignored) and not _equal(labels, tokens, ignored)


def _follow(labels: Tensor, tokens: Tensor, ignored: int) -> bool:
    return _equal(labels[:, :-1], tokens[:, 1:], ignored)


def _equal(labels: Tensor, tokens: Tensor, ignored: int) -> bool:
    return bool(((labels == tokens) | (labels == ignored)).all())


def digest(*tensors: Tensor) -> str:
    """A few words that differ where the tensors, their shapes or their types do."""
    made = hashlib.blake2b(digest_size=7)
    for x in tensors:
        made.update(f"{x.dtype} {tuple(x.shape)}".encode())
        made.update(x.detach().cpu().contiguous().numpy().tobytes())
    return made.hexdigest()
