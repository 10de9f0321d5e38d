"""Ulysses: an all-to-all from sharded tokens to sharded heads, attention, and an all-to-all back.

After DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509): each of U ranks receives all tokens of the U ranks for 1/U
of the query heads and the key heads that these read. With more ranks than the number of heads allows, an ``inner``
schedule runs between groups of U ranks (after USP, https://arxiv.org/abs/2405.07719).

[Note: shapes] H query heads and G key heads of the call, U ranks in an all-to-all, h = H / U.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from distflash.geometry import Geometry, Together
from distflash.plan import Plan
from distflash.schedules.all_to_all import AllToAll
from distflash.schedules.base import Asked, Schedule
from distflash.schedules.heads import HeadShare
from distflash.schedules.ring import Ring
from distflash.transport import PointToPoint, Subset, Transport


@dataclass(frozen=True)
class Ulysses(Schedule):
    """All-to-all over heads within groups of ranks, and another schedule between the groups.

    Args:
        inner: the schedule between groups. On a one-dimensional mesh all ranks are one group, and it is not used.
        dim: the dimension of a two-dimensional mesh whose ranks exchange heads; the other one is the inner schedule's.
            By default the last, which has consecutive ranks, usually of one host.
        shape: of the mesh; set by `ContextParallel`.

    Raises:
        ValueError: an argument has the wrong type.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, schedule=df.Ulysses())
        >>> q, k, v = (torch.randn(1, 16, heads, 32) for heads in (4, 2, 2))
        >>> df.attention(q, k, v, mask=df.Causal(), cp=cp).shape
        torch.Size([1, 16, 4, 32])
    """

    inner: Schedule = field(default_factory=Ring)
    dim: int = -1
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Schedule) or isinstance(self.inner, Ulysses):
            raise ValueError(f"Ulysses(inner): expected another schedule, such as df.Ring(), got {self.inner!r}")
        if self.inner.reproducible:
            raise ValueError(
                f"Ulysses(inner): with {self.inner!r} bits would still depend on the number of ranks, which says how "
                "many heads a kernel call has; take schedule=df.Reproducible() alone"
            )
        if type(self.dim) is not int or self.dim not in (-2, -1, 0, 1):  # 1.0 is no index, True no dimension
            raise ValueError(f"Ulysses(dim): expected 0 or 1, a dimension of the mesh, got {self.dim!r}")

    def on(self, shape: tuple[int, ...]) -> Ulysses:
        if len(shape) == 1:
            shape = (1, *shape) if self.dim in (-1, 1) else (*shape, 1)
        inner = shape[:-1] if self.dim in (-1, 1) else shape[1:]
        return replace(self, inner=self.inner.on(inner), shape=shape)

    def plan(self, geometry: Geometry, rank: int) -> Plan:
        """The plan of the inner schedule, whose ranks are the groups."""
        queries = Together(geometry.queries, self.groups)
        keys = queries if geometry.keys is geometry.queries else Together(geometry.keys, self.groups)
        inside = Geometry(geometry.mask, queries, keys, geometry.seq_len)
        return self.inner.plan(inside, self.group_of(rank))

    def placement(self, among: Transport, asked: Asked) -> AllToAll | None:
        U = self.degree
        if U == 1:
            return None
        if asked.heads % U:
            fits = [n for n in range(1, asked.heads + 1) if asked.heads % n == 0]
            raise ValueError(
                f"schedule: {asked.heads} query heads cannot be divided among the {U} ranks that exchange heads; with "
                f"Ulysses their number is one that divides the heads, here one of {fits}. On a two-dimensional mesh "
                "the other dimension takes the rest of the ranks"
            )
        return AllToAll(among, self.groups, HeadShare(asked.heads, asked.kv_heads, U), asked)

    def among(self, transport: Transport) -> PointToPoint:
        """The ranks with this rank's index in their groups, between which the inner schedule exchanges keys."""
        members = self.groups[self.group_of(transport.rank)]
        return Subset(transport, tuple(group[members.index(transport.rank)] for group in self.groups))

    @property
    def degree(self) -> int:
        """U, the number of ranks that exchange heads."""
        assert self.shape is not None, "ContextParallel sets it"
        return self.shape[self.dim]

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that exchange heads. The last dimension of the mesh has consecutive ranks."""
        assert self.shape is not None, "ContextParallel sets it"
        U, W = self.degree, prod(self.shape)
        if self.dim in (-1, 1):
            return tuple(tuple(range(first, first + U)) for first in range(0, W, U))
        return tuple(tuple(range(first, W, W // U)) for first in range(W // U))

    def group_of(self, rank: int) -> int:
        return next(n for n, members in enumerate(self.groups) if rank in members)
