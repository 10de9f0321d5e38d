"""TRL's SFTTrainer with context parallelism. Imported only when it is used."""

from __future__ import annotations

from typing import Any

import trl

from distflash.integrations.transformers.trainer import ContextParallelMixin


class SFTTrainer(ContextParallelMixin, trl.SFTTrainer):
    """``trl.SFTTrainer`` with ``context_parallel=cp``; see `ContextParallelMixin`.

    Packed sequences and ``padding_free`` batches become documents.

    Raises:
        ValueError: also for ``label_smoothing_factor`` and for the routers' auxiliary loss of a mixture of experts,
            which TRL would compute from a rank's tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            raise ValueError(
                "label_smoothing_factor: is not supported by SFTTrainer over several ranks; set it to 0, or use "
                "dft.Trainer, which supports it"
            )
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                f"router_aux_loss_coef: got {self.router_aux_loss_coef}, but the routers' auxiliary loss is not "
                "supported by SFTTrainer over several ranks: it would be that of each rank's tokens; set it to 0.0"
            )
