"""Data loaders by data rank: ranks that share a sequence get the same batch."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from distflash.integrations.transformers.data_ranks import DataRanks


def prepare_loader(accelerator: Accelerator, loader: DataLoader[Any], ranks: DataRanks) -> DataLoader[Any]:
    """``accelerator.prepare_data_loader``, with data ranks in place of ranks.

    Batches are never dispatched by one rank: each rank reads the data set. An iterable one must yield the same on all.

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
        # A sampler without a generator uses the global random state, which dropout may have made different on the
        # ranks. With several data ranks accelerate gives it a generator.
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
    prepared._is_accelerate_prepared = True  # the accelerator then only registers it
    return accelerator.prepare_data_loader(prepared)


def seed_workers(loader: DataLoader[Any], ranks: DataRanks) -> None:
    """Pass the data rank to Transformers' ``worker_init_fn``, so that a group's ranks seed their workers alike."""
    seed = loader.worker_init_fn
    if isinstance(seed, partial) and "rank" in seed.keywords:
        loader.worker_init_fn = partial(seed.func, *seed.args, **{**seed.keywords, "rank": ranks.rank})
