"""Options of uptraining."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Suppress

from distflash.recipes.config import ModelConfig, TrainConfig
from distflash.recipes.options import positive, require, whole_sentences

Method = Literal["mean", "first", "random"]


@dataclass(frozen=True)
@whole_sentences
class UptrainConfig(TrainConfig):
    """Reduce a checkpoint of the train job to fewer key heads, and continue training for a fraction of its steps.

    A run of that job's defaults takes under 1 minute on two CPU cores, with two ranks; --compare about 4.
    """

    source: Path = Path("runs/train")
    """The --out of a training run, whose newest checkpoint is read, or one of its step-* folders."""
    kv_heads: int | None = None
    """New number of key and value heads: a divisor of the query heads, less than the source's. By default half of the
    source's."""
    method: Method = "mean"
    """How to make a new key head: the mean of the heads in its group, the first of them, or random."""
    share: float = 0.1
    """Steps to train, as a fraction of the source's steps. The learning rate restarts with a warm-up, and so do
    optimizer moments and step counts of keys and values."""
    compare: bool = False
    """Uptrain with all three methods, and train the unchanged source as a baseline, each in a folder of --out. Held-out
    losses are in compare.json and compare.png. --resume continues a comparison."""
    held_out: Path | None = None
    """Text like --data that the source was not trained on. Its loss is measured during training and written to
    held_out.json. By default, with --compare, the tests of Python's standard library."""
    held_out_batches: int = 8
    """Batches per measurement of the held-out loss."""
    held_out_points: int = 10
    """Number of measurements after the initial one."""
    seed: int = 1
    """Seed of the data order, and of random heads. Use another than the source's: its own repeats the source's first
    batches."""
    out: Path = Path("runs/uptrain")
    """Folder of the run: metrics.jsonl, loss.png and checkpoints, including step 0."""
    checkpoint_activations: bool = False
    """As in the train job: keep only the input of each block and the output of its attention."""
    recompute_attention: bool = False
    """With --checkpoint-activations: recompute attention too."""

    # Set from the source.
    model: Suppress[ModelConfig] = field(default_factory=ModelConfig)
    steps: Suppress[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("--share", self.share)
        for name in ("held_out_batches", "held_out_points"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")
        require(
            not (self.compare and self.data is not None and self.held_out is None),
            "--compare",
            "--data without --held-out beside it",
            "text for --held-out that --data does not have",
        )
