"""TRL's supervised fine-tuning over sequences that ranks hold together. Imported only when it is used."""

from __future__ import annotations

from typing import Any

from distflash.integrations.transformers.trainer import ContextParallelMixin

try:
    import trl
except ImportError as error:
    raise ImportError('SFTTrainer: needs TRL; pip install "distflash[trainer]"') from error


class SFTTrainer(ContextParallelMixin, trl.SFTTrainer):
    """``trl.SFTTrainer`` with ``context_parallel=cp``; see `ContextParallelMixin`.

    Packed sequences and ``padding_free`` batches are documents, each of which sees itself only.

    Raises:
        ValueError: also for ``label_smoothing_factor``, which TRL computes from whole labels.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            raise ValueError(
                "label_smoothing_factor: is not supported by SFTTrainer over several ranks; set it to 0, or use "
                "dft.Trainer, which supports it"
            )
