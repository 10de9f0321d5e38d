"""Which heads each of several ranks takes.

[Note: shapes] H query heads, G key heads, U ranks, h = H / U.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShare:
    """Which heads each of U ranks takes.

    Each has h query heads next to one another, and a key head for every so many of them: as many as divide h and read
    the same key head. A key head that several ranks read is sent to each of them, once.

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
        """The key head of each of the member's key heads, as kernels see them: ascending, some of them repeated."""
        some, group = self.queries(member), self.heads // self.kv_heads
        reads = [head // group for head in range(some.start, some.stop)]
        sizes = [size for size in range(len(reads), 0, -1) if len(reads) % size == 0]
        size = next(n for n in sizes if all(reads[i] == reads[i + n - 1] for i in range(0, len(reads), n)))
        return reads[::size]

    def distinct(self, member: int) -> slice:
        """Those that are sent, which are next to one another."""
        keys = self.keys(member)
        return slice(keys[0], keys[-1] + 1)

    def repeats(self, member: int) -> list[int] | None:
        """For each of the member's key heads, which of the distinct ones it is; None if each is another."""
        keys = self.keys(member)
        places = [key - keys[0] for key in keys]
        return None if places == list(range(len(places))) else places

    @property
    def replicates(self) -> bool:
        """Whether some key head is read by several members, or repeated."""
        return sum(len(self.keys(member)) for member in range(self.ranks)) > self.kv_heads
