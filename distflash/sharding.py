"""How the tokens of a sequence move between whole and sharded, and between layouts: part of `ContextParallel`."""

from __future__ import annotations

from torch import Tensor

from distflash import collectives, redistribution
from distflash.agreement import Agreement
from distflash.layouts import Layout
from distflash.masks import Documents


class Sharding:
    """Tensors of tokens, over the ranks that hold a sequence together.

    Attributes:
        layout: which tokens each rank holds.
        agreement: of the ranks.
    """

    layout: Layout
    agreement: Agreement

    @property
    def rank(self) -> int:
        """This rank's place among those that share the sequence."""
        return self.agreement.transport.rank

    @property
    def world_size(self) -> int:
        """How many ranks share the sequence."""
        return self.agreement.transport.world_size

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's slice, along ``dim``, of a tensor that every rank holds whole. Differentiable.

        The length of ``dim`` is the global length and need not divide by anything.

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
        """The whole tensor from every rank's slice along ``dim``: the inverse of `shard`. All ranks must call.

        Differentiable: its backward sums the ranks' gradients of the whole and returns this rank's slice, which is the
        gradient of the sum of all ranks' losses.

        Raises:
            ValueError: on every rank, if the slices are not what the layout gives each rank.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.unshard(cp.positions(8), dim=0)
            tensor([0, 1, 2, 3, 4, 5, 6, 7])
        """
        return collectives.unshard(x, dim, self.layout, self.agreement)

    def gather(self, x: Tensor, dim: int = 1, seq_len: int | None = None) -> Tensor:
        """Every rank's tokens, whole, on every rank, as `unshard`. All ranks must call.

        For a layer that mixes tokens by something else than attention: it runs on the whole sequence, and `shard` keeps
        this rank's part of what it returns. The sum over ranks of the layer's gradients is then that of one process.
        Its backward reduces and scatters: a rank receives the gradients of its own tokens only.

        Args:
            x: this rank's tokens along ``dim``.
            seq_len: the global length. Where it is given, no rank asks the others how many tokens they hold, which on
                GPUs the host would have to wait for.

        Raises:
            ValueError: on every rank, if an argument is wrong on any, or they differ. With ``seq_len``, on GPUs only
                before the first call with these sizes.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.gather(cp.positions(8), dim=0, seq_len=8)
            tensor([0, 1, 2, 3, 4, 5, 6, 7])
        """
        if seq_len is None:
            return self.unshard(x, dim)
        return collectives.gather(x, dim, seq_len, self.layout, self.agreement)

    def halo(self, x: Tensor, left: int, dim: int = 1, documents: Documents | None = None) -> tuple[Tensor, Tensor]:
        """This rank's tokens with the ``left`` rows that precede them in the sequence. All ranks must call.

            rows, places = cp.halo(x, left=3)
            y = causal_conv1d_of_4_taps(rows)[:, places]

        In front of each run of this rank's consecutive tokens come the rows of the tokens before it, and zeros where
        the sequence, or the document, has none. Only these rows travel, each once to a rank. `Contiguous` has one run,
        `Zigzag` two; in `Striped` every token is a run of its own, so that there are ``left + 1`` times as many rows.

        Args:
            x: this rank's tokens along ``dim``.
            left: how many rows, at least 0: k - 1 for a causal convolution of k taps.
            documents: where packed documents end. A document's first tokens have zeros before them.

        Returns:
            The rows, as ``x`` but for their number along ``dim``, and the places int64 ``[seq_local]`` of this rank's
            tokens among them. Differentiable: gradients of rows that travelled are sent back and added up.

        Raises:
            ValueError: on every rank, if an argument is wrong on any, or they differ.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> rows, places = cp.halo(1 + cp.positions(8), left=1, dim=0)
            >>> rows, places
            (tensor([0, 1, 2, 6, 7, 8]), tensor([1, 2, 4, 5]))
        """
        return redistribution.halo(x, left, dim, documents, self.layout, self.agreement)

    def relayout(self, x: Tensor, dim: int, layout: Layout, source: Layout | None = None) -> Tensor:
        """This rank's tokens in another layout. Only tokens that change ranks travel. All ranks must call.

        Args:
            x: this rank's tokens along ``dim``, in ``source``.
            layout: which tokens this rank is to have.
            source: which ones it has; None for the layout of this ContextParallel.

        Returns:
            As ``x``, but with ``layout.length(seq_len, world_size, rank)`` tokens. Differentiable.

        Raises:
            ValueError: on every rank, if an argument is wrong on any, or they differ.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.relayout(cp.positions(8), 0, df.Contiguous())
            tensor([0, 1, 2, 3])
        """
        return redistribution.relayout(x, dim, layout, self.layout if source is None else source, self.agreement)
