"""Checks of DeepSpeed's configuration. Options that give wrong gradients with context parallelism raise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

Config = dict[str, Any]

_AXES = (
    "the axes are those of Topology(pipe=..., data=..., context=...). DeepSpeed's own sequence and tensor parallelism "
    "cannot be combined with them; leave the key out"
)
_REFUSED_KEYS = {
    "sequence_parallel_size": f"changes DeepSpeed's bookkeeping of batches and nothing else: {_AXES}",
    "data_parallel_size": _AXES,
    "tensor_parallel": _AXES,
    "curriculum_learning": (
        "cuts tensors to a shorter length, which is a rank's part here, and leaves the sequence with holes; give "
        "ShardBatch shorter sequences instead"
    ),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a topology's axes."""

    pipe: int
    data: int
    context: int


def read_config(config: Mapping[str, Any] | str | Path) -> Config:
    """A configuration, given as a dict or a path, as a new dict."""
    if isinstance(config, Mapping):
        return deepcopy(dict(config))
    if not isinstance(config, str | Path) or not Path(config).is_file():
        raise ValueError(f"config: expected a dict or the path of a JSON file, got {config!r}")
    return dict(json.loads(Path(config).read_text()))


def check_config(config: Config, sizes: Sizes) -> None:
    """Raise a ValueError for options that DeepSpeed does not support, or would silently get wrong, with these sizes."""
    for problem in (_refused_key, _stage, _clipping, _reduction, _batch):
        if (words := problem(config, sizes)) is not None:
            raise ValueError(f"config: {words}")


def in_ranks(config: Config, sizes: Sizes) -> Config:
    """The configuration with DeepSpeed's batch size, which counts a sequence once for each rank that holds a shard.

    So ``train_batch_size`` is ``context`` times as large. Micro-batches and their number stay the same.
    """
    if "train_batch_size" not in config:
        return config
    return {**config, "train_batch_size": config["train_batch_size"] * sizes.context}


def zero_stage(config: Config) -> int:
    """The ZeRO stage; 0 for none."""
    section = config.get("zero_optimization", {})
    if isinstance(section, bool):  # deprecated, but DeepSpeed still takes it for stage 1
        return int(section)
    return int(section.get("stage", 0))


def _refused_key(config: Config, sizes: Sizes) -> str | None:
    for key, reason in _REFUSED_KEYS.items():
        section = config.get(key)
        off = isinstance(section, dict) and not (section.get("enabled") or section.get("autotp_size"))
        if key in config and not off:
            return f'"{key}" {reason}'
    return None


def _stage(config: Config, sizes: Sizes) -> str | None:
    stage = zero_stage(config)
    if stage not in (0, 1, 2, 3):
        return f'"zero_optimization": expected a stage of 0 to 3, got {stage}'
    if stage >= 2 and sizes.pipe > 1:
        return (
            f'"zero_optimization": stage {stage} shards what the {sizes.pipe} stages of a pipeline add up locally, '
            "which DeepSpeed cannot combine; set the stage to 1, or pipe to 1"
        )
    return None


def _clipping(config: Config, sizes: Sizes) -> str | None:
    limit = config.get("gradient_clipping", GRADIENT_CLIPPING_DEFAULT)
    if not limit or zero_stage(config) != 0 or sizes.pipe == 1:
        return None
    if any(config.get(name, {}).get("enabled") for name in ("bf16", "bfloat16", "fp16")):
        return None
    left_out = "" if "gradient_clipping" in config else ", its default where it is left out"
    return (
        f'"gradient_clipping": is {limit}{left_out}, but in float32 without ZeRO DeepSpeed takes the norm of the first '
        'stage for that of all; set "zero_optimization": {"stage": 1}, or set gradient_clipping to 0 and, to clip by '
        "the norm over all stages, call clip_gradients(optimizer, model, max_norm) once"
    )


def _reduction(config: Config, sizes: Sizes) -> str | None:
    if config.get("gradient_allreduce_op", "mean") == "mean":
        return None
    return (
        '"gradient_allreduce_op": Topology.mean and CausalLoss are made for gradients that are averaged; leave it out'
    )


def _batch(config: Config, sizes: Sizes) -> str | None:
    total, micro, steps = (
        config.get(name)
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if total is None:
        return None
    counted = f"sequences, of which each of the {sizes.data} data-parallel groups of ranks brings an equal number"
    if total % sizes.data:
        return f'"train_batch_size": {total} {counted}; set it to a multiple of {sizes.data}'
    if micro is not None and steps is not None and total != micro * steps * sizes.data:
        return (
            f'"train_batch_size": {total} {counted}, but {micro} in a micro-batch x {steps} micro-batches x '
            f"{sizes.data} groups are {micro * steps * sizes.data} sequences, however many ranks hold each; leave "
            "one of the three out"
        )
    return None
