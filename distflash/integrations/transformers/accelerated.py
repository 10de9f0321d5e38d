"""Context parallelism in a training loop with accelerate."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from distflash.context import ContextParallel
from distflash.integrations.transformers.batch import shard_batch
from distflash.integrations.transformers.data_ranks import DataRanks, data_ranks
from distflash.integrations.transformers.loaders import prepare_loader
from distflash.integrations.transformers.padding import unpadded


def prepare(accelerator: Accelerator, *objects: Any, context_parallel: ContextParallel) -> Any:
    """``accelerator.prepare(*objects)`` with context parallelism.

        model, optimizer, loader, scheduler = dft.prepare(
            accelerator, model, optimizer, loader, scheduler, context_parallel=cp
        )
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    Loaders give each group of ranks its own batches, and each rank its shard of them (`shard_batch`). Schedulers step
    once per data rank (accelerate's step once per process). Pass all of ``batch`` to the model. The mean of the ranks'
    losses, and of their gradients, is that of the group's batch.

    Args:
        accelerator: in a script started by torchrun or accelerate launch.
        objects: as for ``accelerator.prepare``. A scheduler comes with its optimizer.
        context_parallel: what `register` was given. All ranks call.

    Returns:
        The objects in order; a single one not in a tuple.

    Raises:
        ValueError: the accelerator does not count all ranks, or one rank dispatches batches.
    """
    ranks = data_ranks(context_parallel)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if accelerator.num_processes != world:
        raise ValueError(
            f"accelerator: counts {accelerator.num_processes} processes of {world}; start the script with torchrun or "
            "accelerate launch, and make the Accelerator before the ContextParallel"
        )
    loaders = {n: prepare_loader(accelerator, x, ranks) for n, x in enumerate(objects) if isinstance(x, DataLoader)}
    rest = {n: x for n, x in enumerate(objects) if not isinstance(x, DataLoader | LRScheduler)}
    prepared = accelerator.prepare(*rest.values())
    made = dict(zip(rest, (prepared,) if len(rest) == 1 else prepared, strict=True)) if rest else {}
    made |= {n: ShardedLoader(loader, context_parallel) for n, loader in loaders.items()}
    for n, scheduler in enumerate(objects):
        if isinstance(scheduler, LRScheduler):
            made[n] = accelerator.prepare_scheduler(_scheduler(accelerator, scheduler, ranks))
    result = tuple(made[n] for n in range(len(objects)))
    return result[0] if len(result) == 1 else result


class ShardedLoader:
    """A prepared loader that shards its batches. Other attributes are the loader's."""

    def __init__(self, loader: DataLoader[Any], cp: ContextParallel) -> None:
        self._loader, self._cp = loader, cp

    def __iter__(self) -> Any:
        return (shard_batch(unpadded(batch), self._cp) for batch in self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Scheduler(AcceleratedScheduler):
    """Steps once per data rank; accelerate's steps once per process."""

    def __init__(self, steps: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, split_batches=True, **kwargs)  # one step at a time
        self._steps = steps

    def step(self, *args: Any, **kwargs: Any) -> None:
        for _ in range(self._steps):
            super().step(*args, **kwargs)


def _scheduler(accelerator: Accelerator, scheduler: LRScheduler, ranks: DataRanks) -> AcceleratedScheduler:
    optimizers = [x for x in accelerator._optimizers if x.optimizer is scheduler.optimizer] or accelerator._optimizers
    steps = 1 if accelerator.split_batches else ranks.count
    made = _Scheduler(steps, scheduler, optimizers, step_with_optimizer=accelerator.step_scheduler_with_optimizer)
    made._is_accelerate_prepared = True
    return made
