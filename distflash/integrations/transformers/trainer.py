"""Trainers of Transformers and TRL with context parallelism: `ContextParallelMixin`, `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distflash.context import ContextParallel
from distflash.integrations.labels import IGNORED
from distflash.integrations.transformers.batch import NAME, shard_batch
from distflash.integrations.transformers.data_ranks import data_ranks
from distflash.integrations.transformers.loaders import prepare_loader
from distflash.integrations.transformers.padding import is_padded, padded_again, unpadded
from distflash.integrations.transformers.trainer_arguments import (
    arguments_problem,
    checkpoint_all_but_attention,
    class_problem,
)

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:  # the mixin works with any trainer class
    _Trainer = object


class ContextParallelMixin(_Trainer):
    """A mixin for trainer classes that shards their batches over the ranks of a group.

        class MyTrainer(dft.ContextParallelMixin, transformers.Trainer): ...
        MyTrainer(model, args, context_parallel=cp, train_dataset=dataset).train()

    Losses, gradients and logs are those of the same trainer with one process per data rank. Batch sizes are per data
    rank as well: the ranks of a group count as one.

    Args:
        context_parallel: the group that `register` was given. Every rank makes the trainer.
        args, kwargs: those of the trainer class.

    Raises:
        ValueError: a setting does not work over several ranks, or differs between ranks.
    """

    accelerator: Any
    _seeded: tuple[int, int] = (-1, 0)  # the step, and which of its micro-batches was the last

    def __init__(self, *args: Any, context_parallel: ContextParallel, **kwargs: Any) -> None:
        if (problem := class_problem(type(self))) is not None:  # before the trainer makes batches, or runs a model
            raise ValueError(problem)
        self.context_parallel = context_parallel
        self.data_ranks = data_ranks(context_parallel)
        super().__init__(*args, **kwargs)
        if (problem := arguments_problem(self)) is not None:
            context_parallel.refuse(problem, "Trainer")
        given = self.args
        context_parallel.agree(
            "Trainer",
            seed=given.seed,
            data_seed=given.data_seed,
            per_device_train_batch_size=given.per_device_train_batch_size,
            per_device_eval_batch_size=given.per_device_eval_batch_size,
            gradient_accumulation_steps=given.gradient_accumulation_steps,
            max_steps=given.max_steps,
            num_train_epochs=given.num_train_epochs,
        )

    # Data loaders, by data rank.

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        accelerator, self.accelerator = self.accelerator, _LeavesAsIs()
        try:
            made = super()._get_dataloader(*args, **kwargs)
        finally:
            self.accelerator = accelerator
        loader = prepare_loader(accelerator, made, self.data_ranks)
        kept = getattr(self, "_eval_dataloaders", {})
        kept |= {key: loader for key, each in kept.items() if each is made}
        return loader

    def get_cp_size(self) -> int:
        """The number of ranks with the same batch. Transformers divides the number of sequences per step by it."""
        return self.data_ranks.context

    def shard_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of the batch, unpadded first. Override to give `shard_batch` other arguments."""
        return shard_batch(self.seeded(unpadded(inputs)), self.context_parallel)

    def seeded(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """In training, adds a ``dropout_seed``: equal on the ranks of a group, and in a resumed run."""
        if not self.model.training or "dropout_seed" in inputs:
            return inputs
        step = self.state.global_step
        self._seeded = step, (self._seeded[1] + 1 if self._seeded[0] == step else 0)
        key = repr((self.args.seed, self.data_ranks.rank, *self._seeded))
        return {**inputs, "dropout_seed": int.from_bytes(blake2b(key.encode(), digest_size=5).digest(), "big")}

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        return inputs if NAME in inputs else self.shard_batch(inputs)

    # The loss. Each rank's is scaled so that its mean over ranks, like the gradients', is over all labels.

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The number of labels by which a rank's loss is divided.

        They are counted over all groups if ``average_tokens_across_devices``, else over this group, and divided by the
        ranks of a group, since the losses of these ranks are averaged. Versions of Transformers differ here, so their
        count is not used.
        """
        counts = [count for count in map(count_labels, batch_samples) if count is not None]
        if not counts or not self.model_accepts_loss_kwargs:
            return None
        total = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices:
            total = self.accelerator.gather(total).sum()
        return total / self.data_ranks.context

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of this rank's tokens, for ``inputs`` from `shard_batch`."""
        with _all_ranks_count(self.accelerator.gradient_state):
            if self.label_smoother is not None and "shift_labels" in inputs:
                loss = self._smoothed_loss(model, inputs, num_items_in_batch)
                result: Any = loss if return_outputs else loss[0]
            else:
                result = super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
        inputs[NAME].require_attended()
        return result

    def _smoothed_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        """Transformers' label smoothing, for labels that are already shifted."""
        unread = ("labels", "shift_labels", "num_items_in_batch")
        outputs = model(**{name: x for name, x in inputs.items() if name not in unread})
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        count = num_items_in_batch if counted else inputs["num_items_in_batch"].value
        loss = self.label_smoother(outputs, inputs["shift_labels"], num_items_in_batch=count)
        if counted and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss, outputs

    # Logged counts: a whole batch counts once.

    def floating_point_ops(self, inputs: Any) -> float:
        """The FLOPs of the whole batch, divided by the ranks that share it."""
        return super().floating_point_ops(inputs) / self.data_ranks.context

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        more = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + more // self.data_ranks.context

    # Evaluation. All ranks of a group have the whole result; it is gathered from one rank per group.

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's evaluation, with predictions and labels of whole sequences."""
        self.gather_function = self._gather_over_data
        return super().evaluation_loop(*args, **kwargs)

    def _gather_over_data(self, x: Any) -> Any:
        state = self.accelerator.gradient_state
        if self.data_ranks.count > 1:
            x = recursively_apply(self.data_ranks.one_of_each, self.accelerator.gather(x))
        if state.end_of_dataloader and state.remainder > 0:  # drop rows that were added to fill the last batch
            x = recursively_apply(lambda rows: rows[: state.remainder], x)
        return x

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of the group's batch; unless ``prediction_loss_only`` also full logits ``[B, S, V]`` and labels."""
        whole = self._prepare_input(inputs)
        part = self.shard_batch(whole)
        labels = whole.get("labels")
        loss = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                outputs = model(**part)
            else:
                count = self._get_num_items_in_batch([whole], self.args.device)
                found = self.compute_loss(model, part, not prediction_loss_only, num_items_in_batch=count)
                loss, outputs = (found, None) if prediction_loss_only else found
        if loss is not None:
            loss = self.context_parallel.mean(loss.detach().mean(), 1, reduction="mean")
        if prediction_loss_only:
            return loss, None, None
        return loss, self._whole_logits(outputs, whole), labels

    def _whole_logits(self, outputs: Any, whole: Mapping[str, Any]) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else None
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"compute_metrics: {type(outputs).__name__} has no logits that could be put together; only they are "
                "supported as predictions over several ranks. Set prediction_loss_only=True"
            )
        gathered = self.context_parallel.unshard(logits.detach(), 1)
        return padded_again(gathered, whole["attention_mask"]) if is_padded(whole) else gathered

    # Around the model.

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint_all_but_attention(self.model, self.args)
        return super()._inner_training_loop(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator. Raises if it does not know of all ranks, before they wait for each other."""
        super().create_accelerator_and_postprocess()
        world = dist.get_world_size() if dist.is_initialized() else 1
        if self.accelerator.num_processes != world:
            raise ValueError(
                f"context_parallel: there are {world} ranks, but the library counts {self.accelerator.num_processes} "
                "process; start the script with torchrun or accelerate launch, which set RANK, WORLD_SIZE and "
                "LOCAL_RANK, and on CPUs pass TrainingArguments(use_cpu=True)"
            )


class Trainer(ContextParallelMixin, transformers.Trainer):
    """``transformers.Trainer`` with ``context_parallel=cp``; see `ContextParallelMixin`."""


def count_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """The number of labels of a whole batch. The first token of a sequence is not predicted, so it is none."""
    if batch.get("shift_labels") is not None:
        return (batch["shift_labels"] != IGNORED).sum()
    return None if batch.get("labels") is None else (batch["labels"][..., 1:] != IGNORED).sum()


class _LeavesAsIs:
    """A stand-in for the accelerator while a trainer makes a loader. The loader is prepared for data ranks later."""

    def prepare(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        return loader


@contextmanager
def _all_ranks_count(state: Any) -> Iterator[None]:
    """Within it, ``gather_for_metrics`` drops nothing after a loader's last batch.

    TRL uses it to gather one sum per rank. These are not rows of a batch, so none may be dropped.
    """
    loader = state.active_dataloader
    if loader is None:
        yield
        return
    remainder, loader.remainder = loader.remainder, -1
    try:
        yield
    finally:
        loader.remainder = remainder
