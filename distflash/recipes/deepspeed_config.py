"""Options of the DeepSpeed job, merged with DeepSpeed's JSON configuration.

Settings that both have come from the command line; the JSON has "auto" for them. All others come from the JSON.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Suppress

from distflash.recipes.config import TrainConfig
from distflash.recipes.options import require, whole_sentences

CONFIGS = Path(__file__).parent / "configs"
# The configurations of the package, by name for --deepspeed.
BUNDLED = {path.stem: path for path in CONFIGS.glob("*.json")}


@dataclass(frozen=True)
@whole_sentences
class DeepSpeedConfig(TrainConfig):
    """Train a byte-level decoder with DeepSpeed on pipe x data x context ranks.

    The defaults take about 3 minutes on two CPU cores, with two ranks.
    """

    out: Path = Path("runs/deepspeed")
    """Folder of the run: metrics.jsonl, loss.png and checkpoints."""
    deepspeed: Path = Path("zero1")
    """DeepSpeed's configuration: zero1, zero3 (both in the package), or a JSON file."""
    pipe: int = 1
    """Pipeline stages. The ranks of one stage and one --data-parallel group shard each sequence."""
    micro_batch_size: int = 1
    """Sequences of a micro-batch, per data-parallel group."""

    verify: bool = False
    """Before DeepSpeed wraps the model: replay the first batch unsharded, compare loss, output and all gradients with
    the sharded step, and stop with an error if they differ by more than rounding. ZeRO's and the pipeline's reduction
    of gradients is not checked."""

    # Options of the main job that this one does not have.
    fsdp: Suppress[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pipe", "micro_batch_size"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")
        require(self.settings.is_file(), "--deepspeed", self.deepspeed, f"{', '.join(sorted(BUNDLED))}, or a JSON file")
        share = self.data_parallel * self.micro_batch_size
        require(
            self.batch_size % share == 0,
            "--batch-size",
            self.batch_size,
            f"a multiple of {share}, --data-parallel x --micro-batch-size",
        )

    def check_ranks(self, world: int) -> None:
        fixed = self.pipe * self.data_parallel
        require(
            world % fixed == 0,
            "--pipe",
            f"{self.pipe} with --data-parallel {self.data_parallel}",
            f"a product that divides the {world} ranks; start a multiple of {fixed}",
        )

    def before_main(self) -> None:
        os.environ["DS_ACCELERATOR"] = self.device_type  # DeepSpeed reads it at import

    @property
    def settings(self) -> Path:
        """The JSON file."""
        return BUNDLED.get(str(self.deepspeed), self.deepspeed)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step."""
        return self.batch_size // (self.data_parallel * self.micro_batch_size)

    def for_deepspeed(self) -> dict[str, Any]:
        """The JSON, completed from the command line. Raises a ValueError if the two contradict."""
        import torch  # not above: `--help` needs none

        settings = read_object(self.settings)
        for section in ("optimizer", "scheduler"):
            require(
                section not in settings, "--deepspeed", f'"{section}" in {self.deepspeed}', "none; see --lr, --beta1"
            )
        for option, path, value in (
            ("--batch-size", "train_batch_size", self.batch_size),
            ("--micro-batch-size", "train_micro_batch_size_per_gpu", self.micro_batch_size),
            ("--batch-size", "gradient_accumulation_steps", self.micro_batches),
            ("--grad-clip", "gradient_clipping", self.optimizer.grad_clip),
            ("--dtype", "bf16/enabled", self.compute_dtype == torch.bfloat16),
        ):
            *sections, key = path.split("/")
            place = settings
            for section in sections:
                place = place.setdefault(section, {})
                require(isinstance(place, dict), "--deepspeed", f'{place} as "{section}"', "an object in braces")
            there = place.get(key, "auto")
            require(
                there in ("auto", value), option, value, f'the {there} of "{path}" in {self.deepspeed}, or "auto" there'
            )
            place[key] = value
        return settings


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises a ValueError that names the file if there is none."""
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--deepspeed: {path} is no JSON ({error}); see {CONFIGS} for files that are") from error
    require(isinstance(settings, dict), "--deepspeed", f"a {type(settings).__name__} in {path}", "an object in braces")
    return settings
