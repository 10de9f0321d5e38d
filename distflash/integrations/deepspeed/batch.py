"""Sharding of whole sequences to a rank's micro-batch, with labels that were shifted before.

[Note: shapes] B sequences of a micro-batch, T local tokens, S global tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distflash.context import ContextParallel
from distflash.integrations.labels import IGNORED, are_tokens, digest, shift
from distflash.masks import Documents

# The name of the comparison of batches.
_KIND = "DeepSpeed batch"

MicroBatch = tuple[Tensor | tuple[Tensor, Tensor], Tensor]


class ShardBatch:
    """Shards a batch that is the same on every rank of a ring.

    Pass it to ``engine.set_batch_fn`` of a pipeline, whose ``data_iter`` then yields unsharded batches. Without a
    pipeline, call it.

    Args:
        cp: the ranks that share a sequence, ``topology.cp``.
        seq_len: the global length S of every batch.
        max_documents: the number of packed documents that ``cu_seqlens`` is padded to, since stages of a pipeline
            exchange tensors of a fixed shape; None without a pipeline.
        ignored: the label of tokens that the loss ignores.
    """

    def __init__(
        self, cp: ContextParallel, seq_len: int, *, max_documents: int | None = None, ignored: int = IGNORED
    ) -> None:
        self.cp, self.seq_len = cp, seq_len
        self.max_documents, self.ignored = max_documents, ignored

    def __call__(self, batch: Any) -> MicroBatch:
        """Shard a batch. All ranks of the ring must call it, and it compares their batches.

        Args:
            batch: ``(tokens, labels)`` or ``((tokens, cu_seqlens), labels)``; tokens and labels int64 ``[B, S]``, each
                label at the token that predicts it (`shift_labels`), cu_seqlens integers ``[documents + 1]`` for all B.

        Returns:
            The same with tokens and labels ``[B, T]``, and cu_seqlens ``[max_documents + 1]``.

        Raises:
            ValueError: on every rank of the ring: a rank's batch is sharded already, has labels that are not shifted,
                or differs from another rank's.
        """
        problem, cu_seqlens = _problem(batch, self), None
        if problem:
            self.cp.refuse(problem, _KIND)
        inputs, labels = batch
        tokens, *documents = inputs if isinstance(inputs, tuple | list) else (inputs,)
        try:
            self.cp.agree(_KIND, batch=digest(tokens, *documents, labels))
        except ValueError as difference:
            raise ValueError(
                f"batch: {difference}. The ranks of a ring hold one sequence together: give each of them the same "
                "whole batch (sampler=topology.sampler(dataset), the same seed), and shard it here only"
            ) from None
        part = self.cp.shard(tokens)
        if documents:
            cu_seqlens = self._padded(documents[0])
        return (part if cu_seqlens is None else (part, cu_seqlens)), self.cp.shard(labels)

    def _padded(self, cu_seqlens: Tensor) -> Tensor:
        ends = torch.tensor(Documents(cu_seqlens).cu_seqlens, device=cu_seqlens.device)
        missing = 0 if self.max_documents is None else self.max_documents + 1 - len(ends)
        return F.pad(ends, (0, missing), value=self.seq_len)


def shift_labels(tokens: Tensor, ignored: int = IGNORED) -> Tensor:
    """The label of each token, ``[B, S] -> [B, S]``: the next token, and ``ignored`` for the last."""
    return shift(tokens, fill=ignored)


def _problem(batch: Any, how: ShardBatch) -> str | None:
    """Check this rank's batch. Returns the error message or None."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return f"batch: expected (tokens, labels) or ((tokens, cu_seqlens), labels), got {type(batch).__name__}"
    inputs, labels = batch
    tokens, *documents = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return (
        _tokens_problem(tokens, how)
        or _labels_problem(tokens, labels, how)
        or (_documents_problem(documents[0], how) if documents else None)
    )


def _tokens_problem(tokens: Any, how: ShardBatch) -> str | None:
    S, W = how.seq_len, how.cp.world_size
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return f"tokens: expected a tensor [batch, seq_len], got {_kind(tokens)}"
    if tokens.shape[1] == S:
        return None
    if W > 1 and tokens.shape[1] == how.cp.seq_local(S):
        return (
            f"tokens: {tokens.shape[1]} are a rank's part of seq_len={S}, so this batch was sharded before; pass whole "
            "sequences, the same on every rank of the ring"
        )
    return (
        f"tokens: expected whole sequences of seq_len={S}, got {tokens.shape[1]} tokens; pad or cut them to one length"
    )


def _labels_problem(tokens: Tensor, labels: Any, how: ShardBatch) -> str | None:
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape:
        return f"labels: expected a tensor {list(tokens.shape)}, as tokens, got {_kind(labels)}"
    if are_tokens(labels, tokens, how.ignored):
        return (
            "labels: are the tokens themselves; a label is the token after: pass shift_labels(tokens), which shifts in "
            "the whole sequence, so that none is lost where a rank's part ends"
        )
    return None


def _documents_problem(cu_seqlens: Any, how: ShardBatch) -> str | None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1:
        return (
            f"cu_seqlens: expected a tensor [documents + 1], which holds for the whole batch, got {_kind(cu_seqlens)}"
        )
    try:
        mask = Documents(cu_seqlens)
    except ValueError as error:
        return str(error)
    if mask.seq_len != how.seq_len:
        return f"cu_seqlens: end at {mask.seq_len}, but seq_len is {how.seq_len}; they must end at S"
    documents = len(mask.cu_seqlens) - 1
    if how.max_documents is not None and documents > how.max_documents:
        return (
            f"cu_seqlens: {documents} documents are more than max_documents={how.max_documents}; "
            "raise it, or pack fewer"
        )
    return None


def _kind(x: Any) -> str:
    return f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
