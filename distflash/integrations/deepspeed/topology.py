"""The topology of pipe x data x context ranks, such that DeepSpeed averages gradients correctly."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from distflash.context import ContextParallel
from distflash.kernels import Kernel
from distflash.layouts import Layout, Zigzag
from distflash.schedules import Ring, Schedule


class Topology(PipeDataParallelTopology):  # type: ignore[misc]
    """A grid of pipe x data x context ranks, and this rank's place in it. `PipelineModule` takes it as ``topology``.

    Ranks that differ only in ``context`` share a sequence and are consecutive. Ranks that differ in ``data`` have other
    sequences, ranks that differ in ``pipe`` other layers. To DeepSpeed, data x context is one axis of data parallelism:
    ZeRO shards over all of these ranks, and gradients are averaged over all of them. With a separate axis for context
    they would not be.

    All ranks must make the same topologies in the same order, since it makes process groups.

    Args:
        context: the number of ranks that share a sequence.
        pipe: the number of pipeline stages; 1 for none.
        data: the number of groups with different sequences; by default as many as there are ranks for.
        layout, schedule, kernel: as for `ContextParallel`.

    Attributes:
        cp: the `ContextParallel` of this rank.
        group: the ranks, data x context, over which gradients are averaged and ZeRO shards.
        pipe, data, context: as given.
        pipe_rank, data_rank: this rank's stage, and the number of its group.

    Raises:
        ValueError: before any group is made, if the sizes do not multiply to the number of ranks, or there are no ranks
            yet.
    """

    def __init__(
        self,
        *,
        context: int,
        pipe: int = 1,
        data: int | None = None,
        layout: Layout = Zigzag(),
        schedule: Schedule = Ring(),
        kernel: Kernel | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise ValueError("Topology: there is no process group yet; call deepspeed.init_distributed() first")
        world = dist.get_world_size()
        self.pipe, self.data, self.context = pipe, _data_size(world, pipe, data, context), context
        super().__init__(num_pp=pipe, num_dp=self.data * context)
        rings = self.data * pipe
        self.group = _mine([range(n * world // pipe, (n + 1) * world // pipe) for n in range(pipe)])
        ring = _mine([range(n * context, (n + 1) * context) for n in range(rings)])
        self.cp = ContextParallel(ring, layout, schedule, kernel)
        self.pipe_rank, place = divmod(dist.get_rank(), self.data * context)
        self.data_rank = place // context

    def __deepcopy__(self, memo: Any) -> Topology:
        """The same object: a copy of a module that holds one is on the same ranks."""
        return self

    def mean(self, loss_sum: Tensor, token_count: Tensor | int) -> Tensor:
        """The mean loss over the tokens of all data x context ranks, for `engine.backward`.

        After DeepSpeed has averaged gradients, they are those of the value returned.

        Args:
            loss_sum: scalar, the sum of this rank's losses.
            token_count: the number of losses in that sum (tokens that are not ignored); may be 0.

        Returns:
            Scalar, the same on every rank of the stage.
        """
        return self.cp.mean(loss_sum, token_count, reduction="mean", group=self.group)

    def sampler(self, dataset: Dataset[Any], **options: Any) -> DistributedSampler[Any]:
        """A sampler by data rank: the ranks that share a sequence, on all stages, get the same sequences.

        Args:
            dataset: of the `DataLoader`.
            options: other arguments of `DistributedSampler`: shuffle, seed, drop_last.
        """
        return DistributedSampler(dataset, num_replicas=self.data, rank=self.data_rank, **options)


def _data_size(world: int, pipe: int, data: int | None, context: int) -> int:
    """The size of the data axis. Raises a ValueError if the three do not fit the ranks."""
    for name, size in (("pipe", pipe), ("data", 1 if data is None else data), ("context", context)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: expected a number of ranks, an int of at least 1, got {size!r}")
    rest, left_over = divmod(world, pipe * context)
    if left_over:
        raise ValueError(
            f"context: {pipe} stages x {context} ranks for a sequence do not divide the {world} ranks there are; "
            f"start a multiple of {pipe * context} ranks, or choose sizes whose product divides {world}"
        )
    if data not in (None, rest):
        raise ValueError(
            f"data: {pipe} stages x {data} sequences x {context} ranks for each do not make the {world} ranks there "
            f"are; leave data out, or set it to {rest}"
        )
    return rest


def _mine(members: list[range]) -> dist.ProcessGroup:
    """Make groups that partition the ranks, and return this rank's. All ranks must call."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks)
