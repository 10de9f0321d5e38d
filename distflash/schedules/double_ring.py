"""The double ring: a ring within each node, and around it a ring over the nodes.

While the keys of one node go round within a node, over fast links, those of the next node are on their way: each rank
exchanges one set of keys over the network in the time of a whole inner ring (https://arxiv.org/abs/2406.18485).

[Note: order] Ranks are numbered node by node. Rank l of node n works in step ``o * L + i`` on the keys of rank
``(l - i) % L`` of node ``(n - o) % N``: N nodes of L ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distflash.schedules.travel import KeysTravel

# GPUs of a usual node.
MOST_PER_NODE = 8


@dataclass(frozen=True)
class DoubleRing(KeysTravel):
    """For several nodes: between nodes every rank sends each set of keys once, under the computation of L steps.

    It moves as many bytes as `Ring`. In a ring the two ranks at a node's ends send all that crosses between nodes, in
    every step; here all ranks of a node share it. Within one node it is the ring.

    Args:
        ranks_per_node: how many ranks share a node; ranks are numbered node by node. None for the last dimension of a
            two-dimensional mesh, otherwise for the largest divisor of the number of ranks that is not above 8, the GPUs
            of a usual node.

    Raises:
        ValueError: ranks_per_node is no int of at least 1. In a call, on every rank and before anything is sent:
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
        """The neighbour in the node, but for the first keys of another node: the same rank of the node before."""
        L = self._per_node(world_size)
        node, local = divmod(rank, L)
        if source % L == local:
            return (node - 1) % (world_size // L) * L + local
        return node * L + (local - 1) % L

    def ahead(self, rank: int, source: int, world_size: int) -> int:
        """Between nodes a whole inner ring, within a node one step."""
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
