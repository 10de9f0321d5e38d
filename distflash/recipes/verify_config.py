"""Options of the verification job."""

from dataclasses import dataclass

from distflash.recipes.config import TrainConfig
from distflash.recipes.options import whole_sentences


@dataclass(frozen=True)
@whole_sentences
class VerifyConfig(TrainConfig):
    """Replay the first batch of a training run unsharded, and compare loss, output and all gradients.

    Takes the options of `distflash train`. Nothing is trained or written. The exit code is 0, or 1 if values differ by
    more than rounding. The defaults take under 1 minute on two CPU cores, with two ranks.
    """

    resume: bool = False
    """Verify the next step of the run in --out, with the weights of its newest checkpoint."""
    verify: bool = True
    """Always on in this job."""
