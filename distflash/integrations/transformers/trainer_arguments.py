"""Checks of a trainer's arguments, and activation checkpointing that does not recompute attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from distflash.checkpointing import keep_attention

# TRL trainers whose loss is a sum over tokens.
_KNOWN_OF_TRL = ("SFTTrainer",)


def class_problem(kind: type) -> str | None:
    """Check a trainer's class."""
    for base in kind.__mro__:
        of_trl = base.__module__.startswith("trl.") and base.__name__.endswith("Trainer")
        if of_trl and base.__name__ not in (*_KNOWN_OF_TRL, "_BaseTrainer"):
            return (
                f"{base.__name__}: is not supported with context parallelism: its loss is one of whole sequences "
                "(rewards, or sums of log-probabilities), of which a rank has a part, and it makes batches of its own. "
                "SFTTrainer and transformers.Trainer are supported"
            )
    return None


def arguments_problem(trainer: Any) -> str | None:
    """Check a trainer's arguments."""
    args = trainer.args
    if getattr(args, "neftune_noise_alpha", None) is not None:
        return (
            "neftune_noise_alpha: is not supported: the size of the noise goes by the length of what a rank holds, not "
            "of the sequence; leave it out"
        )
    if getattr(args, "predict_with_generate", False):
        return "predict_with_generate: is not supported; evaluate the loss, and generate with a ShardedCache"
    if trainer.compute_loss_func is not None:
        return (
            "compute_loss_func: is not supported: it would be given this rank's logits and no whole labels. Override "
            "compute_loss, whose inputs hold this rank's shift_labels, or leave it out"
        )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        return "train_sampling_strategy: 'batch_rebalance' deals batches to all ranks; it is not supported"
    if args.eval_use_gather_object:
        return "eval_use_gather_object: is not supported; leave it out"
    if args.n_gpu > 1:
        return f"n_gpu: {args.n_gpu} GPUs in one process are not supported; start one process for each, with torchrun"
    if trainer.get_tp_size() > 1:
        return "tp_size: tensor parallelism beside context parallelism is not supported by the trainer"
    config = getattr(trainer.accelerator, "parallelism_config", None)
    if config is not None and (config.cp_size > 1 or config.sp_size > 1):
        return (
            "parallelism_config: asks accelerate for its own context or sequence parallelism beside "
            "context_parallel=cp; leave cp_size and sp_size out"
        )
    return None


def checkpoint_all_but_attention(model: nn.Module, args: Any) -> None:
    """If a trainer uses activation checkpointing, keep attention's outputs: see `keep_attention`.

    Unless the arguments have ``use_reentrant=True``, a ``context_fn``, or TRL's ``selective``. The arguments stay
    unchanged, since they are saved as JSON.
    """
    switched_on = getattr(args, "activation_checkpointing", None)
    given = getattr(args, "activation_checkpointing_kwargs", None)
    if not (args.gradient_checkpointing if switched_on is None else switched_on):
        return
    kwargs = dict((args.gradient_checkpointing_kwargs if given is None else given) or {})
    if kwargs.get("use_reentrant") or "context_fn" in kwargs or "selective" in kwargs:
        return
    others = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    kwargs |= {"use_reentrant": False, "context_fn": keep_attention}
    anything: Any = model
    if hasattr(model, "activation_checkpointing_enable"):
        anything.activation_checkpointing_disable()
        anything.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **others)
    else:
        anything.gradient_checkpointing_disable()
        anything.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **others)
