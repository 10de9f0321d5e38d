"""`distflash verify`: the check that `--verify` makes before training, without the training."""

import torch
import torch.distributed as dist

from distflash.recipes.data import Corpus
from distflash.recipes.reporting import Reporter
from distflash.recipes.trainer import on_ranks, open_text, prepare
from distflash.recipes.verify_config import VerifyConfig


def main(config: VerifyConfig) -> int:
    """Run the job and return the exit code: 0, 1 where values differ, 2 where an option or the text is refused."""
    return on_ranks(config, lambda device: verify(config, open_text(config), device))


def verify(config: VerifyConfig, corpus: Corpus, device: torch.device) -> int:
    """Verify the first step as the options say. All ranks call; raises as `distflash.recipes.verify.show`."""
    start = prepare(config, corpus, device)
    report = Reporter(config, first_step=start.first, active=dist.get_rank() == 0)
    report.print(start.describe())
    start.verify(report)
    return 0
