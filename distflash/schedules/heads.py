"""Which heads each of several ranks computes.

[Note: shapes] H query heads, G key heads, U ranks, h = H / U.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShare:
    """Which heads each of U ranks computes.

    Each rank has h consecutive query heads. They are divided into equal groups that read one key head each, as large as
    possible, and the rank has one key head for each group. A key head that several ranks need is sent to each of them
    once.

    Attributes:
        heads, kv_heads: H and G.
        ranks: U.
    """

    heads: int
    kv_heads: int
    ranks: int

    def queries(self, member: int) -> slice:
        share = self.heads // self.ranks
        return slice(member * share, (member + 1) * share)

    def keys(self, member: int) -> list[int]:
        """The key heads of a member, as its kernel sees them: ascending, and repeated where groups share one."""
        queries, group = self.queries(member), self.heads // self.kv_heads
        reads = [head // group for head in range(queries.start, queries.stop)]
        sizes = [size for size in range(len(reads), 0, -1) if len(reads) % size == 0]
        size = next(n for n in sizes if all(reads[i] == reads[i + n - 1] for i in range(0, len(reads), n)))
        return reads[::size]

    def distinct(self, member: int) -> slice:
        """The key heads that the member receives, without repetitions; they are consecutive."""
        keys = self.keys(member)
        return slice(keys[0], keys[-1] + 1)

    def repeats(self, member: int) -> list[int] | None:
        """For each of the member's key heads, its index among the distinct ones; None if no head is repeated."""
        keys = self.keys(member)
        places = [key - keys[0] for key in keys]
        return None if places == list(range(len(places))) else places

    @property
    def replicates(self) -> bool:
        """Whether a key head is sent to several members, or repeated."""
        return sum(len(self.keys(member)) for member in range(self.ranks)) > self.kv_heads
