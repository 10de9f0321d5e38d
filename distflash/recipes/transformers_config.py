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
    """Train a randomly initialised Llama of Transformers with its Trainer, each sequence over some or all ranks.

    On several GPUs, FSDP2 shards weights, gradients and optimizer state over all ranks. On CPUs every rank holds all.
    The defaults take about 3 minutes on two CPU cores, with two ranks.
    """

    out: Path = Path("runs/transformers")
    """Folder of the run: metrics.jsonl, loss.png and checkpoints."""
    attention: Literal["distflash", "torch"] = "distflash"
    """distflash, or for comparison torch's own context parallelism: on GPUs, sequences that twice the ranks divide."""
    vocab_size: int = VOCABULARY
    """Entries of the vocabulary. Bytes use 256; more make embedding, logits and loss as large as with a tokenizer."""
    loss_chunk: int = 4096
    """Tokens of each sequence whose logits are computed at a time, and again in backward. 0: all of them once."""
    repeat_kv: bool = False
    """Beside --attention torch: give every query head its own keys and values."""

    # Not asked for here: it is on where there are several GPUs.
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
