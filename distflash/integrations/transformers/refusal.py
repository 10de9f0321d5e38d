"""What the ranks compare once a batch, and how a rank that refuses one tells those that wait for it."""

from __future__ import annotations

from typing import NoReturn

from distflash.agreement import Agreement, Signature
from distflash.api import ContextParallel
from distflash.integrations.transformers.batch import Shard


def signature(shard: Shard | None) -> Signature:
    """What all ranks must have alike; without a shard, its fields alone."""
    if shard is None:
        return (("seq_len", 0), ("documents", None), ("input_ids", ""), ("labels", ""))
    return (("seq_len", shard.seq_len), ("documents", shard.documents), *shard.contents)


def refuse(cp: ContextParallel, problem: str) -> NoReturn:
    """Raise ``problem``, and tell the other ranks, who may be comparing signatures, that this one does."""
    Agreement(cp.transport).refuse(len(signature(None)))
    raise ValueError(problem)
