"""Data loaders whose batches go by the data rank: the ranks that share a sequence are given the same batch."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from distflash.integrations.transformers.data_ranks import DataRanks


def prepare_loader(accelerator: Accelerator, loader: DataLoader[Any], ranks: DataRanks) -> DataLoader[Any]:
    """What ``accelerator.prepare_data_loader`` makes of a loader, for data ranks instead of all ranks.

    Batches are never dispatched by one rank: each reads the data set, also an iterable one, which has to yield the same
    on all ranks.

    Raises:
        ValueError: dispatch_batches is True.
    """
    if accelerator.dispatch_batches:
        raise ValueError(
            "dispatch_batches: True is not supported: each rank reads its batches itself, so that those that share a "
            "sequence can be given the same one; leave it out"
        )
    seed_workers(loader, ranks)
    rng_types = list(accelerator.rng_types or ())
    if ranks.count == 1 < ranks.context:
        # A sampler without a generator draws from the random state, in which dropout may have parted the ranks. With
        # several data ranks the library gives it a generator.
        rng_types.append("torch")
    prepared: Any = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=ranks.count,
        process_index=ranks.rank,
        split_batches=accelerator.split_batches,
        put_on_device=accelerator.device_placement,
        rng_types=rng_types,
        dispatch_batches=False,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    prepared._is_accelerate_prepared = True  # by which the accelerator only notes it
    return accelerator.prepare_data_loader(prepared)


def seed_workers(loader: DataLoader[Any], ranks: DataRanks) -> None:
    """Have the library's ``worker_init_fn``, which is given the rank, seed the workers of a group's ranks alike."""
    seed = loader.worker_init_fn
    if isinstance(seed, partial) and "rank" in seed.keywords:
        loader.worker_init_fn = partial(seed.func, *seed.args, **{**seed.keywords, "rank": ranks.rank})
