"""The options of the main job, with their help.

The defaults are the quickstart: a model small enough for two CPU cores, whose loss falls from 5.5 to below 2.5 in two
minutes. From the root of the repository, without further options:

    python -m torch.distributed.run --standalone --nproc-per-node 2 launch/train.py --verify
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distflash.recipes.options import Placed, positive, printable, require, whole_sentences

VOCABULARY = 256  # bytes; byte 0, which text does not have, separates documents


@dataclass(frozen=True)
@whole_sentences
class ModelConfig:
    """The decoder."""

    layers: int = 4
    """Number of decoder blocks."""
    dim: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads. The head dimension is dim / heads."""
    kv_heads: int = 2
    """Key and value heads, each shared by heads / kv_heads query heads."""
    ffn: int | None = None
    """Hidden width of the SwiGLU feed-forward. Left out: 8/3 of dim, rounded up to a multiple of 32."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding. Raise it for long sequences (500000 at 128K tokens)."""
    checkpoint_activations: bool = False
    """Keep only the input of each block and the output of its attention, and recompute the rest in backward: less
    memory, and up to a third more work outside attention."""
    recompute_attention: bool = False
    """With --checkpoint-activations: recompute attention and its communication too. Least memory, most work."""

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "kv_heads"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")
        require(
            self.dim % self.heads == 0 and self.dim // self.heads % 2 == 0,
            "--dim",
            f"{self.dim} for {self.heads} heads",
            "an even number of channels per head (dim / heads), which rotary positions need; change --dim or --heads",
        )
        require(
            self.heads % self.kv_heads == 0,
            "--kv-heads",
            f"{self.kv_heads} for {self.heads} query heads",
            "a divisor of --heads",
        )
        positive("--rope-theta", self.rope_theta)
        require(self.ffn is None or self.ffn >= 1, "--ffn", self.ffn, "at least 1")
        require(
            self.checkpoint_activations or not self.recompute_attention,
            "--recompute-attention",
            "it alone",
            "--checkpoint-activations beside it",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def ffn_dim(self) -> int:
        return self.ffn if self.ffn is not None else -(-8 * self.dim // 3 // 32) * 32


@dataclass(frozen=True)
@whole_sentences
class OptimizerConfig:
    """AdamW, its learning rate and gradient clipping."""

    lr: float = 2e-3
    """Highest learning rate, reached after the warm-up."""
    min_lr_ratio: float = 0.1
    """The learning rate at the end of the cosine, as a fraction of lr."""
    warmup: int = 10
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices. Gains of the norms are not decayed."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of the squared gradient."""
    grad_clip: float = 1.0
    """Largest norm of the global gradient. 0 turns clipping off."""

    def __post_init__(self) -> None:
        positive("--lr", self.lr)
        require(0 <= self.min_lr_ratio <= 1, "--min-lr-ratio", self.min_lr_ratio, "a share between 0 and 1")
        require(self.warmup >= 0, "--warmup", self.warmup, "0 or more steps")
        require(0 <= self.weight_decay < math.inf, "--weight-decay", self.weight_decay, "0 or more, and finite")
        require(0 <= self.beta1 < 1, "--beta1", self.beta1, "0 <= beta1 < 1")
        require(0 <= self.beta2 < 1, "--beta2", self.beta2, "0 <= beta2 < 1")
        require(0 <= self.grad_clip < math.inf, "--grad-clip", self.grad_clip, "0 (no clipping) or more, and finite")


@dataclass(frozen=True)
@whole_sentences
class TrainConfig(Placed):
    """Train a byte-level decoder. Every sequence is sharded over all ranks, or over those of a data-parallel group.

    The defaults take about 3 minutes on two CPU cores, with two ranks.
    """

    data: Path | None = None
    """A text file, or a folder whose text files are read in the order of their paths. Left out: the source of the
    running Python's standard library."""
    seq_len: int = 1024
    """Tokens (bytes) of one whole sequence. It need not be divisible by anything."""
    batch_size: int = 2
    """Sequences in one step, over all data-parallel groups."""
    data_parallel: int = 1
    """Number of data-parallel groups, each with its share of the batch. The ranks of one group shard each of its
    sequences."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over all ranks (FSDP2). By default every rank holds all of them."""
    steps: int = 250
    """Optimizer steps of the whole run, including those before a resume."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data. It does not depend on the number of ranks."""
    layout: Literal["zigzag", "contiguous", "striped", "balanced"] = "zigzag"
    """Which positions a rank holds. zigzag and striped balance the work of a causal mask."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: the GPUs if there are any."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type. Weights, gradients and optimizer state are float32 in any case. auto: bfloat16 on GPUs, float32 on
    CPUs."""
    threads: int = 0
    """CPU threads of each rank. 0 keeps the choice of torch and the launcher."""
    out: Path = Path("runs/train")
    """Folder of the run: metrics.jsonl, loss.png and checkpoints."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, on any number of ranks and in any layout."""
    overwrite: bool = False
    """Delete a previous run in --out and start anew."""
    checkpoint_every: int = 0
    """Steps between checkpoints. The last step and SIGTERM or SIGINT always write one. 0: only those."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk. Older ones are deleted when the step after the newest has a
    finite loss, so that a run that diverges keeps a good one."""
    log_every: int = 10
    """Steps between printed lines where the output is no terminal. metrics.jsonl has every step."""
    verify: bool = False
    """Replay the first batch unsharded, and compare loss, output and all gradients with the sharded step. If they
    differ by more than rounding, stop with an error that names the first layer that differs. Every rank holds the whole
    batch for it. Most sensitive with --dtype float32."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "data_parallel", "steps", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")
        require(
            self.batch_size % self.data_parallel == 0,
            "--batch-size",
            self.batch_size,
            f"a multiple of the {self.data_parallel} groups of --data-parallel",
        )
        for name, limit in (("seed", 2**64), ("threads", 2**16), ("checkpoint_every", 2**63)):
            came = getattr(self, name)
            require(0 <= came < limit, f"--{name.replace('_', '-')}", came, f"0 or more, and less than {limit}")
        # Not all libraries that write to it support other names.
        shown = printable(self.out)
        require(shown == str(self.out), "--out", shown, "a name in UTF-8")
        require(not (self.resume and self.overwrite), "--resume", "--overwrite beside it", "one of the two")
        self.check_device()

    def check_ranks(self, world: int) -> None:
        require(
            world % self.data_parallel == 0,
            "--data-parallel",
            self.data_parallel,
            f"a divisor of the {world} ranks",
        )

    @property
    def vocabulary(self) -> int:
        """Entries of the model's vocabulary."""
        return VOCABULARY
