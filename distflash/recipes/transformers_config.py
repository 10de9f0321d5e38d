"""Options of the job on Transformers' Trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Suppress

from distflash.recipes.config import VOCABULARY, TrainConfig
from distflash.recipes.options import require, whole_sentences


@dataclass(frozen=True)
@whole_sentences
class TransformersConfig(TrainConfig):
    """Train a randomly initialised Llama with the Transformers Trainer, each sequence sharded over ranks.

    On several GPUs, FSDP2 shards weights, gradients and optimizer state over all ranks. On CPUs every rank holds all.
    The defaults take about 3 minutes on two CPU cores, with two ranks.
    """

    out: Path = Path("runs/transformers")
    """Folder of the run: metrics.jsonl, loss.png and checkpoints."""
    attention: Literal["distflash", "torch"] = "distflash"
    """distflash, or for comparison torch's context parallelism (GPUs only; twice the ranks must divide --seq-len)."""
    vocab_size: int = VOCABULARY
    """Vocabulary size. Bytes need 256; a larger one gives embedding, logits and loss the cost of a tokenizer's."""
    loss_chunk: int = 4096
    """Compute logits and loss in chunks of so many tokens, and again in backward. 0: no chunks, no recomputation."""
    repeat_kv: bool = False
    """With --attention torch: expand keys and values to all query heads."""

    # Not an option here: on with several GPUs.
    fsdp: Suppress[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.vocab_size >= VOCABULARY, "--vocab-size", self.vocab_size, f"at least {VOCABULARY}")
        require(self.loss_chunk >= 0, "--loss-chunk", self.loss_chunk, "0 or more tokens")
        require(
            self.attention == "torch" or not self.repeat_kv, "--repeat-kv", "it alone", "--attention torch beside it"
        )
        if self.attention == "torch":
            require(not self.verify, "--verify", "--attention torch beside it", "--attention distflash")
            require(self.device_type == "cuda", "--attention", "torch on CPUs", "GPUs, or --attention distflash")
            require(self.layout == "zigzag", "--layout", self.layout, "zigzag, the only one that torch has")

    def check_ranks(self, world: int) -> None:
        super().check_ranks(world)
        pieces = 2 * world // self.data_parallel
        require(
            self.attention != "torch" or self.seq_len % pieces == 0,
            "--seq-len",
            self.seq_len,
            f"a multiple of {pieces} for torch",
        )

    @property
    def vocabulary(self) -> int:
        return self.vocab_size
