"""Forward and backward of one step, sharded or (for verification) unsharded."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

import distflash as df
from distflash.recipes.config import TrainConfig
from distflash.recipes.data import Corpus
from distflash.recipes.model import Decoder, loss_sum


@dataclass(frozen=True)
class Step:
    """Forward and backward of a step, given its number. `cp=None`: this rank holds the whole sequence.

    share: (n, count): this rank has part n of `count` parts of the batch. reduction: of gradients over all ranks.
    """

    config: TrainConfig
    corpus: Corpus
    device: torch.device
    cp: df.ContextParallel | None
    share: tuple[int, int] = (0, 1)
    reduction: Literal["sum", "mean"] = "sum"

    def __call__(self, model: Decoder, step: int) -> Tensor:
        """Accumulate gradients, and return the mean loss over all tokens of all ranks."""
        loss = self.loss(model, step)
        loss.backward()
        return loss.detach()

    def loss(self, model: Decoder, step: int) -> Tensor:
        """The mean loss over all tokens of all ranks, without backward."""
        config = self.config
        positions = torch.arange(config.seq_len) if self.cp is None else self.cp.positions(config.seq_len)
        tokens, labels = self.corpus.batch(
            seed=config.seed,
            step=step,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            positions=positions,
            share=self.share,
        )
        reduced = config.compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=config.compute_dtype, enabled=reduced):
            logits = model(tokens.to(self.device), config.seq_len)
        total = loss_sum(logits, labels.to(self.device))
        if self.cp is None:
            return total / labels.numel()
        return self.cp.mean(total, labels.numel(), reduction=self.reduction, group=dist.group.WORLD)
