"""`distflash verify`: the check of `--verify`, without training."""

import torch
import torch.distributed as dist

from distflash.recipes.data import Corpus
from distflash.recipes.reporting import Reporter
from distflash.recipes.trainer import on_ranks, open_text, prepare
from distflash.recipes.verify_config import VerifyConfig


def main(config: VerifyConfig) -> int:
    """Run the job and return the exit code: 0, 1 if values differ, 2 if an option or the text is invalid."""
    return on_ranks(config, lambda device: verify(config, open_text(config), device))


def verify(config: VerifyConfig, corpus: Corpus, device: torch.device) -> int:
    """Verify the first step. All ranks call. Raises like `distflash.recipes.verify.show`."""
    start = prepare(config, corpus, device)
    report = Reporter(config, first_step=start.first, active=dist.get_rank() == 0)
    report.print(start.describe())
    start.verify(report)
    return 0
