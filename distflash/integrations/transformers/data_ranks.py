"""Data-parallel ranks: the groups of ranks that share a sequence, for samplers, gathers and schedulers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.context import ContextParallel


@dataclass(frozen=True)
class DataRanks:
    """The groups of ranks that share a sequence, among all ranks.

    Attributes:
        groups: the ranks of each group, numbered as in the default group; a group's index is its data rank.
        rank: the data rank of this rank.
    """

    groups: tuple[tuple[int, ...], ...]
    rank: int

    @property
    def count(self) -> int:
        """The number of groups, each with its own batches."""
        return len(self.groups)

    @property
    def context(self) -> int:
        """The number of ranks that share a sequence."""
        return len(self.groups[0])

    def one_of_each(self, gathered: Tensor) -> Tensor:
        """From rows gathered from all ranks in order, those of one rank per group."""
        by_rank = gathered.chunk(self.count * self.context)
        return torch.cat([by_rank[group[0]] for group in self.groups])


def data_ranks(cp: ContextParallel) -> DataRanks:
    """The groups. All ranks of the default process group must call.

    Raises:
        ValueError: on every rank, if the groups do not partition all ranks evenly.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(
            f"context_parallel: expected a ContextParallel, got {cp!r}; make one of the process group first"
        )
    if not dist.is_initialized():
        return DataRanks(((0,),), 0)
    members = getattr(cp.transport, "members", (dist.get_rank(),))
    told: list[tuple[int, ...] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, tuple(members))
    groups = sorted({tuple(group) for group in told if group is not None}, key=min)
    if sorted(rank for group in groups for rank in group) != list(range(len(told))) or len({*map(len, groups)}) > 1:
        raise ValueError(
            f"context_parallel: the ranks that share a sequence are {groups}, which does not share out ranks 0 to "
            f"{len(told) - 1} evenly; make it of one dimension of a mesh of all ranks, such as "
            'init_device_mesh(device, (data, context), mesh_dim_names=("data", "context"))["context"]'
        )
    return DataRanks(tuple(groups), next(n for n, group in enumerate(groups) if dist.get_rank() in group))
