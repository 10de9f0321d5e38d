"""Layers for a `PipelineModule`, which pass the residual stream and the boundaries of packed documents.

A stream is a tensor: token ids ``[B, T]`` first, then ``[B, T, dim]``. With packed documents, it is a tuple of that
tensor and ``cu_seqlens``, int64 ``[documents + 1]``, which DeepSpeed sends from stage to stage (see `ShardBatch`).

[Note: shapes] B sequences of a micro-batch, T local tokens, S global tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distflash.context import ContextParallel
from distflash.integrations.deepspeed.topology import Topology
from distflash.integrations.labels import IGNORED
from distflash.mask_algebra import Mask
from distflash.masks import Causal, Documents

Stream = Tensor | tuple[Tensor, Tensor]


class TokenWise(nn.Module):
    """A layer that acts on each token by itself: an embedding, a norm, a projection to the vocabulary.

    Args:
        make: a class, or a function that returns the module, ``[B, T, ...] -> [B, T, ...]``.
        arguments: for ``make``.
    """

    def __init__(self, make: Callable[..., nn.Module], *arguments: Any) -> None:
        super().__init__()
        self.module = make(*arguments)

    def forward(self, stream: Stream) -> Stream:
        return _with(stream, self.module(_tokens(stream)))


class Embedding(nn.Embedding):
    """Token ids to the residual stream; tied, the residual stream to logits as well.

    Tied embeddings are one module in two places of the list of layers:

        TiedLayerSpec("embedding", Embedding, vocabulary, dim),
        ...
        TiedLayerSpec("embedding", Embedding, vocabulary, dim, forward_fn=Embedding.logits),
    """

    def forward(self, stream: Stream) -> Stream:  # type: ignore[override]
        return _with(stream, super().forward(_tokens(stream)))

    def logits(self, stream: Stream) -> Stream:
        """Project ``[B, T, dim]`` to ``[B, T, V]`` by the embedding's own weight."""
        return _with(stream, F.linear(_tokens(stream), self.weight))


class DecoderBlock(nn.Module):
    """A decoder block with `distflash.attention`, to which it passes the mask and the global length.

    Args:
        make: a class or function for the block, ``forward(x [B, T, dim], *, mask, seq_len) -> [B, T, dim]``, which
            passes both to `attention` or `nn.SelfAttention`.
        arguments: for ``make``.
        cp: ``topology.cp``, which the block's attention also has.
        seq_len: the global length S. Batches that were not sharded, or twice, have another one and raise.
        mask: which keys a query sees, within its document if the stream has documents.

    Raises:
        ValueError: the block takes no mask and seq_len; or, at its forward, this rank's tokens are not those that the
            layout gives it.
    """

    def __init__(
        self,
        make: Callable[..., nn.Module],
        *arguments: Any,
        cp: ContextParallel,
        seq_len: int,
        mask: Mask = Causal(),
    ) -> None:
        super().__init__()
        self.block = make(*arguments)
        self.cp, self.seq_len, self.mask = cp, seq_len, mask
        if missing := {"mask", "seq_len"} - signature(self.block.forward).parameters.keys():
            raise ValueError(
                f"make: {type(self.block).__name__}.forward takes no {' and no '.join(sorted(missing))}; a block has "
                "to take mask and seq_len and hand them to distflash.attention"
            )

    def forward(self, stream: Stream) -> Stream:
        x = _tokens(stream)
        self._require_length(x)
        mask = self.mask & documents_of(stream[1]) if isinstance(stream, tuple) else self.mask
        return _with(stream, self.block(x, mask=mask, seq_len=self.seq_len))

    def _require_length(self, x: Tensor) -> None:
        cp, expected = self.cp, self.cp.seq_local(self.seq_len)
        if x.shape[1] != expected:
            cp.refuse(
                f"tokens: {x.shape[1]} on this rank, but {cp.layout!r} gives rank {cp.rank} of {cp.world_size} "
                f"{expected} of seq_len={self.seq_len}; shard whole batches, and once, with ShardBatch",
                in_attention=True,
            )


class CausalLoss(nn.Module):
    """Mean cross-entropy over the tokens of all data x context ranks: the ``loss_fn`` of a `PipelineModule`.

    Args:
        topology: whose ranks bring the tokens.
        ignored: the label of tokens that do not count.
    """

    def __init__(self, topology: Topology, ignored: int = IGNORED) -> None:
        super().__init__()
        self.topology, self.ignored = topology, ignored

    def forward(self, stream: Stream, labels: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` and labels ``[B, T]`` (as `ShardBatch` makes them) to a scalar, in nats."""
        logits = _tokens(stream)
        if labels.shape != logits.shape[:2]:
            raise ValueError(
                f"labels: expected one for each of the {list(logits.shape[:2])} tokens of this rank, got "
                f"{list(labels.shape)}; shard tokens and labels together, with ShardBatch"
            )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=self.ignored, reduction="sum")
        return self.topology.mean(total, (labels != self.ignored).sum())


def documents_of(cu_seqlens: Tensor) -> Documents:
    """The mask of boundaries that were padded to a fixed number by repeating the last, S."""
    ends = cu_seqlens.tolist()
    return Documents(ends[: ends.index(ends[-1]) + 1])


def _tokens(stream: Stream) -> Tensor:
    return stream[0] if isinstance(stream, tuple) else stream


def _with(stream: Stream, tokens: Tensor) -> Stream:
    return (tokens, stream[1]) if isinstance(stream, tuple) else tokens
