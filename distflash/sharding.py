"""Sharding, gathering and redistribution of tokens, and means over them: a part of `ContextParallel`."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash import collectives, groups, lengths, redistribution, validation
from distflash.agreement import Agreement
from distflash.layouts import Layout
from distflash.masks import Documents
from distflash.transport import Transport

# Stands for an argument that must be given. It has a default only so that a call without it gets our error, which
# lists the values, instead of a TypeError of Python's.
_REQUIRED: Any = None


class Sharding:
    """The methods of `ContextParallel` that shard, gather, redistribute and average tensors of tokens.

    Attributes:
        layout: which tokens each rank holds.
        agreement: compares calls over the ranks.
    """

    layout: Layout
    agreement: Agreement

    @property
    def rank(self) -> int:
        """This rank's number among the ranks that share the sequence."""
        return self.agreement.transport.rank

    @property
    def world_size(self) -> int:
        """The number of ranks that share the sequence."""
        return self.agreement.transport.world_size

    def seq_local(self, seq_len: int) -> int:
        """How many of ``seq_len`` tokens this rank holds.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.seq_local(11)
            5
        """
        return self.layout.length(lengths.require_seq_len(seq_len), self.world_size, self.rank)

    def positions(self, seq_len: int, device: torch.device | str | None = None) -> Tensor:
        """The global positions of this rank's tokens, int64 ``[seq_local]``, ascending; for RoPE and similar.

        Args:
            seq_len: the global length, at least 0.
            device: by default the group's: the current GPU under NCCL, else the CPU.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.positions(10)
            tensor([0, 1, 7, 8, 9])
        """
        seq_len = lengths.require_seq_len(seq_len)
        positions = self.layout.positions(seq_len, self.world_size, self.rank)
        return positions.to(self.agreement.transport.device if device is None else device)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's shard, along ``dim``, of a tensor that every rank has in full. Differentiable.

        The size of ``dim`` is the global length; it need not be divisible by anything.

        Raises:
            ValueError: x has no such dimension.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.shard(torch.arange(8), dim=0)
            tensor([0, 1, 6, 7])
        """
        dim = collectives.dimension(x, dim)
        return collectives.take(x, dim, self.layout.ranges(x.shape[dim], self.world_size, self.rank))

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The full tensor from every rank's shard along ``dim``: the inverse of `shard`. All ranks must call it.

        Differentiable: its backward sums the gradients of all ranks and returns this rank's shard of the sum, which is
        the gradient of the sum of all ranks' losses.

        Raises:
            ValueError: on every rank, if the shards do not have the lengths that the layout gives.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.unshard(cp.positions(8), dim=0)
            tensor([0, 1, 2, 3, 4, 5, 6, 7])
        """
        return collectives.unshard(x, dim, self.layout, self.agreement)

    def gather(self, x: Tensor, dim: int = 1, seq_len: int | None = None) -> Tensor:
        """The tokens of all ranks (all-gather), as `unshard`. All ranks must call it.

        For layers other than attention that mix tokens: the layer runs on the full sequence, and `shard` takes this
        rank's part of its output. The weights' gradients, summed over ranks, are then those of one process. The
        backward is a reduce-scatter.

        Args:
            x: this rank's tokens along ``dim``.
            seq_len: the global length. If None, ranks exchange their lengths, and the host synchronises with the GPU.

        Raises:
            ValueError: on every rank, if an argument is wrong on any rank, or arguments differ. On GPUs with
                ``seq_len``, only the first call with these sizes is checked.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.gather(cp.positions(8), dim=0, seq_len=8)
            tensor([0, 1, 2, 3, 4, 5, 6, 7])
        """
        if seq_len is None:
            return self.unshard(x, dim)
        return collectives.gather(x, dim, seq_len, self.layout, self.agreement)

    def halo(
        self, x: Tensor, left: int, dim: int = 1, documents: Documents | None = None, seq_len: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """This rank's tokens with the ``left`` rows that precede them in the sequence. All ranks must call it.

            rows, places = cp.halo(x, left=3)
            y = causal_conv1d_of_4_taps(rows)[:, places]

        Each run of consecutive tokens of this rank is preceded by the rows of the ``left`` tokens before it, or by
        zeros at the start of the sequence or of a document. Only these rows are sent, each once per rank. `Contiguous`
        has one run, `Zigzag` two. With `Striped` every token is a run, so there are ``left + 1`` times as many rows.

        Args:
            x: this rank's tokens along ``dim``.
            left: the number of rows, at least 0: k - 1 for a causal convolution of k taps.
            documents: the packed documents. Zeros precede the first tokens of each.
            seq_len: the global length; see `gather`.

        Returns:
            The rows, a tensor like ``x`` with more rows along ``dim``, and the indices, int64 ``[seq_local]``, of this
            rank's tokens in it. Differentiable: gradients of rows of other ranks are sent back and added there.

        Raises:
            ValueError: on every rank, if an argument is wrong on any rank, or arguments differ. With
                ``seq_len``, on GPUs only before the first call with these arguments.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> rows, places = cp.halo(1 + cp.positions(8), left=1, dim=0)
            >>> rows, places
            (tensor([0, 1, 2, 6, 7, 8]), tensor([1, 2, 4, 5]))
        """
        return redistribution.halo(x, left, dim, documents, self.layout, seq_len, self.agreement)

    def relayout(
        self, x: Tensor, dim: int, layout: Layout, source: Layout | None = None, seq_len: int | None = None
    ) -> Tensor:
        """Redistribute tokens to another layout. Only tokens that change ranks are sent. All ranks must call it.

        Args:
            x: this rank's tokens along ``dim``, in the layout ``source``.
            layout: the new layout.
            source: the layout of x; None for the layout of this ContextParallel.
            seq_len: the global length; see `gather`.

        Returns:
            A tensor like ``x`` with ``layout.length(seq_len, world_size, rank)`` tokens. Differentiable.

        Raises:
            ValueError: on every rank, if an argument is wrong on any rank, or arguments differ. With
                ``seq_len``, on GPUs only before the first call with these arguments.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.relayout(cp.positions(8), 0, df.Contiguous())
            tensor([0, 1, 2, 3])
        """
        source = self.layout if source is None else source
        return redistribution.relayout(x, dim, layout, source, seq_len, self.agreement)

    def mean(
        self,
        loss_sum: Tensor,
        token_count: Tensor | int,
        *,
        reduction: Literal["sum", "mean"] = _REQUIRED,
        group: dist.ProcessGroup | DeviceMesh | Transport | None = None,
    ) -> Tensor:
        """The mean of a loss over the tokens of all ranks. All ranks must call it.

        Args:
            loss_sum: scalar, the sum of this rank's losses.
            token_count: how many losses that sum has (tokens that are not ignored); may be 0.
            reduction: how parameter gradients are combined over the group after backward; must be given. "mean" if they
                are averaged, as DDP, FSDP and ZeRO do. "sum" if they are added, as an all-reduce of your own does. Also
                "sum" if ranks share no parameter, so that no gradients are combined. With the right value the combined
                gradient is the gradient of what is returned. The wrong value scales it by the number of ranks, which
                Adam hides.
            group: the ranks over whose tokens the mean is taken, and over which gradients are combined. None: the ranks
                that share the sequence. With data parallelism: all ranks of data x context, as a process group or a
                one-dimensional mesh.

        Returns:
            Scalar, the same on every rank of the group; 0 if no rank has a token.

        Raises:
            ValueError: an argument has the wrong type, or the group does not hold all ranks that share the sequence.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> losses = cp.shard(torch.arange(5.0), dim=0)  # of this rank's tokens
            >>> cp.mean(losses.sum(), losses.numel(), reduction="mean")
            tensor(2.)
        """
        own = self.agreement.transport
        all_ranks = own if group is None else groups.wider_transport(group, own)
        problem = validation.mean_problem(loss_sum, token_count, reduction)
        if problem is not None:
            collectives.refuse_mean(all_ranks)
            raise ValueError(problem)
        return collectives.mean(loss_sum, token_count, all_ranks, reduction)
