"""The double ring: a ring within each node, and around it a ring over the nodes.

While keys circulate within a node, over fast links, the next node's keys are being received: each rank exchanges one
set of keys over the network in the time of one inner ring (https://arxiv.org/abs/2406.18485).

[Note: order] There are N nodes of L ranks, numbered node by node. In step ``o * L + i``, rank l of node n computes the
keys of rank ``(l - i) % L`` of node ``(n - o) % N``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distflash.schedules.travel import KeysTravel

# GPUs of a common node.
MOST_PER_NODE = 8


@dataclass(frozen=True)
class DoubleRing(KeysTravel):
    """For several nodes: each exchange between nodes overlaps the computation of L steps, for L ranks a node.

    It moves as many bytes as `Ring`. In a ring, only the first and last rank of a node communicate with other nodes, in
    every step; here all ranks of a node share this traffic. On one node it is the ring.

    Args:
        ranks_per_node: how many ranks share a node; ranks are numbered node by node. None for the last dimension of a
            two-dimensional mesh, otherwise for the largest divisor of the number of ranks up to 8.

    Raises:
        ValueError: ranks_per_node is not an int of at least 1. In a call, on every rank and before anything is sent:
            it does not divide the number of ranks.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, schedule=df.DoubleRing(ranks_per_node=2))
        >>> q, k, v = (torch.randn(1, 16, heads, 32) for heads in (4, 2, 2))
        >>> df.attention(q, k, v, mask=df.Causal(), cp=cp).shape
        torch.Size([1, 16, 4, 32])
    """

    ranks_per_node: int | None = None

    def __post_init__(self) -> None:
        L = self.ranks_per_node
        if L is not None and (not isinstance(L, int) or isinstance(L, bool) or L < 1):
            raise ValueError(f"DoubleRing(ranks_per_node): expected a number of ranks, at least 1, or None, got {L!r}")

    def on(self, shape: tuple[int, ...]) -> DoubleRing:
        return replace(self, ranks_per_node=shape[1]) if self.ranks_per_node is None and len(shape) == 2 else self

    def sources(self, rank: int, world_size: int) -> tuple[tuple[int, ...], ...]:
        L = self._per_node(world_size)
        node, local = divmod(rank, L)
        nodes = world_size // L
        return tuple(((node - o) % nodes * L + (local - i) % L,) for o in range(nodes) for i in range(L))

    def route(self, rank: int, source: int, world_size: int) -> int:
        """The previous rank of the node; for the first keys of another node, the same rank of the previous node."""
        L = self._per_node(world_size)
        node, local = divmod(rank, L)
        if source % L == local:
            return (node - 1) % (world_size // L) * L + local
        return node * L + (local - 1) % L

    def ahead(self, rank: int, source: int, world_size: int) -> int:
        """One inner ring (L steps) between nodes, one step within a node."""
        L = self._per_node(world_size)
        return 1 if rank // L == source // L else L

    def _per_node(self, world_size: int) -> int:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        if self.ranks_per_node is None:
            return max(n for n in divisors if n <= MOST_PER_NODE)
        if self.ranks_per_node not in divisors:
            raise ValueError(
                f"schedule: {self!r} over {world_size} ranks; expected nodes of equally many ranks, so a number that "
                f"divides {world_size}: {', '.join(map(str, divisors))}. Where nodes are unequal, use df.Ring()"
            )
        return self.ranks_per_node
