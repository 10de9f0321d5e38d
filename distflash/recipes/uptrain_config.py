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
    """Give a checkpoint of the train job fewer key heads, and train it on for a share of its steps.

    A run of that job's defaults takes under 1 minute on two CPU cores, with two ranks; --compare about 4.
    """

    source: Path = Path("runs/train")
    """The --out of a run of the train job, of which the newest checkpoint is taken, or one of its step-* folders."""
    kv_heads: int | None = None
    """Key and value heads afterwards: a divisor of the query heads, and fewer than the source has. Left out: half of
    the source's."""
    method: Method = "mean"
    """What a new key head is: the mean of those of its group of query heads, the first of them, or drawn anew."""
    share: float = 0.1
    """Steps to train on for, as a share of those that the source has made. The learning rate warms up and falls again
    over them, and moments and step counts of keys and values begin anew."""
    compare: bool = False
    """Uptrain by all three methods, and the source as it is, each in a folder of --out; the held-out losses against
    steps are in compare.json and compare.png. With --resume it goes on where it was stopped."""
    held_out: Path | None = None
    """Text that the source was not trained on, as --data: its loss is measured on the way, and kept in held_out.json.
    Left out: with --compare the tests of the running Python's standard library, which the default of --data has not."""
    held_out_batches: int = 8
    """Batches of held-out text that are read each time."""
    held_out_points: int = 10
    """How often it is measured on the way, beside at once."""
    seed: int = 1
    """Seed of the order of the data, and of heads that are drawn. Give another one than the source had: with its own,
    the text of its first steps comes once more."""
    out: Path = Path("runs/uptrain")
    """Folder of the run: metrics.jsonl, loss.png and checkpoints, the first of them at once."""
    checkpoint_activations: bool = False
    """As in the train job: keep only the input of each block and the result of its attention."""
    recompute_attention: bool = False
    """Beside --checkpoint-activations: recompute attention too."""

    # Known from the source.
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
