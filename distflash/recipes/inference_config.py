"""Options of the generation and evaluation jobs, with their help."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distflash.recipes.options import Placed, printable, require, whole_sentences


@dataclass(frozen=True)
@whole_sentences
class InferenceConfig(Placed):
    """Options that generation and evaluation share."""

    checkpoint: Path = Path("runs/train")
    """The --out of a training run, whose newest checkpoint is read, or one checkpoint. It may be of any number of
    ranks."""
    chunk: int = 8192
    """Tokens per forward, over all ranks. Larger chunks are faster and need more memory."""
    layout: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    """Which positions of a chunk a rank computes. zigzag and striped balance the work of a causal mask."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: the GPUs if there are any."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type, and that of the cache. auto: bfloat16 on GPUs, float32 on CPUs."""
    threads: int = 0
    """CPU threads of each rank. 0 keeps the choice of torch and the launcher."""

    def __post_init__(self) -> None:
        require(self.chunk >= 1, "--chunk", self.chunk, "at least 1")
        require(0 <= self.threads < 2**16, "--threads", self.threads, f"0 or more, and less than {2**16}")
        self.check_device()


@dataclass(frozen=True)
@whole_sentences
class GenerateConfig(InferenceConfig):
    """Continue a text with a byte-level decoder. Prompt and cache are sharded over all ranks.

    The prompt is --prompt, --prompt-file or standard input. The new text goes to standard output, and all else to
    standard error. The defaults take under 1 minute on two CPU cores.
    """

    prompt: str | None = None
    """The text to continue. An empty one starts a document."""
    prompt_file: Path | None = None
    """A file with the text to continue."""
    max_new_tokens: int = 256
    """Most tokens (bytes) to generate. Generation also stops at the end of a document."""
    stop: str | None = None
    """A stop string, such as a newline, after which generation ends."""
    temperature: float = 0.8
    """Divides the logits. 0 takes the likeliest token."""
    top_p: float = 0.95
    """Nucleus sampling: draw from the likeliest tokens with this total probability. 1: all tokens."""
    seed: int = 0
    """Seed of the sampling. Results do not depend on the number of ranks."""

    def __post_init__(self) -> None:
        require(
            self.prompt is None or self.prompt_file is None, "--prompt", "--prompt-file beside it", "one of the two"
        )
        require(self.max_new_tokens >= 1, "--max-new-tokens", self.max_new_tokens, "at least 1")
        require(self.stop != "", "--stop", "no text", "at least one character")
        require(0 <= self.temperature < math.inf, "--temperature", self.temperature, "0 (greedy) or more, and finite")
        require(0 < self.top_p <= 1, "--top-p", self.top_p, "a share above 0 and up to 1")
        require(0 <= self.seed < 2**63, "--seed", self.seed, f"0 or more, and less than {2**63}")
        super().__post_init__()


@dataclass(frozen=True)
@whole_sentences
class EvaluateConfig(InferenceConfig):
    """Measure a byte-level decoder on held-out text: bits per byte, and the loss by position.

    Each sequence is sharded over all ranks and processed in chunks. The defaults take about 1 minute on two CPU cores.
    """

    held_out: Path | None = None
    """A text file, or a folder whose text files are read in the order of their paths. By default the tests of Python's
    standard library, which the default of the training excludes."""
    seq_len: int | None = None
    """Tokens (bytes) of one sequence. By default twice the training length."""
    sequences: int = 64
    """Number of sequences, evenly spaced over the text."""
    trained_seq_len: int | None = None
    """The training length, to report losses beyond it. Only for checkpoints without it."""
    out: Path | None = None
    """Folder for evaluation.json and evaluation.png. By default that of the checkpoint's run."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "trained_seq_len", "sequences"):
            came = getattr(self, name)
            require(came is None or came >= 1, f"--{name.replace('_', '-')}", came, "at least 1")
        shown = "" if self.out is None else printable(self.out)
        require(self.out is None or shown == str(self.out), "--out", shown, "a name in UTF-8")
        super().__post_init__()
