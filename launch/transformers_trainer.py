"""A Llama of Transformers with FSDP2 over data x context. Options, data and reports are those of the main job."""

import os
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tyro.conf import Suppress

import distflash as df
from launch.checkpoint import checkpoints_of
from launch.config import TrainConfig, require
from launch.data import Corpus
from launch.fsdp import whole
from launch.loop import check_finite
from launch.model import VOCABULARY, flops_per_token
from launch.optimizer import adamw, learning_rate
from launch.options import parse
from launch.reporting import Metrics, Reporter, peak_memory_gib, plot_loss
from launch.together import on_lead
from launch.trainer import prepare_out, ranks_of, run
from launch.transformers_model import (
    Attention,
    CausalLM,
    DistflashAttention,
    Shape,
    TorchAttention,
    Unsharded,
    checkpoint_layers,
    shard_model,
)
from launch.verify import show, verify_run

# Steps that are left out of the rate: memory pools grow and kernels are compiled.
WARM_UP = 2


@dataclass(frozen=True)
class TransformersConfig(TrainConfig):
    """Train a randomly initialised Llama of Transformers: FSDP2 over all ranks, each sequence over some or all."""

    out: Path = Path("runs/transformers")
    """Folder of the run: metrics.jsonl and loss.png."""
    attention: Literal["distflash", "torch"] = "distflash"
    """distflash, or for comparison torch's own context parallelism: on GPUs, sequences that twice the ranks divide."""
    vocab_size: int = VOCABULARY
    """Entries of the vocabulary. Bytes use 256; more make embedding, logits and loss as large as with a tokenizer."""
    loss_chunk: int = 4096
    """Tokens of each sequence whose logits are computed at a time, and again in backward. 0: all of them once."""
    repeat_kv: bool = False
    """Beside --attention torch: give every query head its own keys and values."""

    # What the main job has and this one has not.
    fsdp: Suppress[bool] = True
    resume: Suppress[bool] = False
    overwrite: Suppress[bool] = False
    checkpoint_every: Suppress[int] = 0
    keep_checkpoints: Suppress[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.vocab_size >= VOCABULARY, "--vocab-size", self.vocab_size, f"at least {VOCABULARY}")
        require(self.loss_chunk >= 0, "--loss-chunk", self.loss_chunk, "0 or more tokens")
        require(
            self.attention == "torch" or not self.repeat_kv, "--repeat-kv", "it alone", "--attention torch beside it"
        )
        if self.attention == "torch":
            require(not self.verify, "--verify", "--attention torch beside it", "--attention distflash")
            pieces = 2 * int(os.environ.get("WORLD_SIZE", 1)) // self.data_parallel
            require(self.device_type == "cuda", "--attention", "torch on CPUs", "GPUs, or --attention distflash")
            require(self.seq_len % max(1, pieces) == 0, "--seq-len", self.seq_len, f"a multiple of {pieces} for torch")
            require(self.layout == "zigzag", "--layout", self.layout, "zigzag, the only one that torch has")


def main(arguments: list[str] | None = None) -> int:
    """Run the job and return the exit code: 0 done, else that of `launch.together`."""
    config = parse(TransformersConfig, arguments)
    return run(config, lambda corpus, device: train(config, corpus, device))


def train(config: TransformersConfig, corpus: Corpus, device: torch.device) -> int:
    mesh = init_device_mesh(
        device.type,
        (config.data_parallel, dist.get_world_size() // config.data_parallel),
        mesh_dim_names=("data", "context"),
    )
    everyone = mesh["data", "context"]._flatten("ranks")
    cp = df.ContextParallel(mesh["context"], layout=config.make_layout())
    ours = config.attention == "distflash"
    attention = DistflashAttention(cp) if ours else TorchAttention(mesh["context"], config.repeat_kv)
    model = build(config, attention, everyone, device)
    optimizer = adamw(model, config.optimizer)
    step = Step(config, corpus, device, cp, attention, everyone, (mesh.get_local_rank("data"), config.data_parallel))

    lead, made = dist.get_rank() == 0, []
    on_lead(lambda: prepare_out(config, None))
    with Reporter(config, first_step=0, active=lead) as report:
        report.print(describe(config, model, cp, device))
        if config.verify:
            show(verify_run(partial(step.run, model), model.model.model, cp, 0, None), report)
        for number in range(config.steps):
            made.append(step(model, optimizer, number))
            check_finite(made[-1], checkpoints_of(config))
            report.step(made[-1])
        report.print(summary(made, device))
    if lead:
        plot_loss(
            config.out, f"Llama of Transformers, {config.attention}, {config.batch_size} x {config.seq_len} tokens"
        )
    return 0


def build(config: TransformersConfig, attention: Attention, mesh: DeviceMesh, device: torch.device) -> CausalLM:
    torch.manual_seed(config.seed)
    with device:  # the same weights on every rank, of which FSDP leaves it a part
        llama = Shape(config.model, config.vocab_size, config.seq_len).build(attention.name)
    if config.model.checkpoint_activations:
        checkpoint_layers(llama, *() if config.model.recompute_attention else (attention.keep,))
    model = CausalLM(llama.train(), config.loss_chunk)
    shard_model(model, mesh, config.compute_dtype)
    return model


@dataclass(frozen=True)
class Step:
    """One step of the optimizer. share: (n, of), which part of the batch is this rank's."""

    config: TransformersConfig
    corpus: Corpus
    device: torch.device
    cp: df.ContextParallel
    attention: Attention
    everyone: DeviceMesh
    share: tuple[int, int]

    def __call__(self, model: CausalLM, optimizer: torch.optim.Optimizer, number: int) -> Metrics:
        config = self.config
        begin = time.perf_counter()
        loss = self.run(model, number, self.cp)
        limit = config.optimizer.grad_clip
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), limit if limit > 0 else torch.inf))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, number, config.steps)
        optimizer.step()
        optimizer.zero_grad()
        numbers = loss.item(), norm.item()  # waits for the device, so the clock below sees the whole step
        seconds = time.perf_counter() - begin
        tokens = config.batch_size * config.seq_len
        flops = flops_per_token(config.model, config.seq_len) + 6 * config.model.dim * (config.vocab_size - VOCABULARY)
        return Metrics(
            step=number + 1,
            loss=numbers[0],
            grad_norm=numbers[1],
            lr=optimizer.param_groups[0]["lr"],
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            tflops_per_rank=tokens * flops / seconds / dist.get_world_size() / 1e12,
            peak_memory_gib=peak_memory_gib(self.device),
        )

    def run(self, model: CausalLM, number: int, cp: df.ContextParallel | None) -> Tensor:
        """The mean loss over all tokens of all ranks; the parameters have its gradient.

        `cp=None`: this rank holds the whole batch, and attends by torch's own attention.
        """
        config = self.config
        tokens, labels = self.corpus.batch(
            seed=config.seed,
            step=number,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            positions=torch.arange(config.seq_len),
            share=self.share if cp is not None else (0, 1),
        )
        attention = self.attention if cp is not None else Unsharded(model.model)
        with attention.shard(tokens.to(self.device), labels.to(self.device)) as (inputs, mine):
            total = model(inputs, mine)
            count = mine.numel()
            loss = total / count if cp is None else cp.mean(total, count, reduction="mean", group=self.everyone)
            loss.backward()
        return loss.detach()


def describe(config: TransformersConfig, model: CausalLM, cp: df.ContextParallel, device: torch.device) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"model: {parameters / 1e9:.3f} B parameters, attention {config.attention}\n"
        f"ranks: {ranks_of(config, cp)}, {config.layout} layout, {config.batch_size} x {config.seq_len} tokens a step, "
        f"{config.compute_dtype} on {kind}"
    )


def summary(made: list[Metrics], device: torch.device) -> str:
    """The rate of a step in the middle, and the most memory of any rank. All ranks call."""
    peak = torch.tensor(peak_memory_gib(device), device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    rate = statistics.median(m.tokens_per_second for m in made[min(WARM_UP, len(made) - 1) :])
    return f"median {rate:,.0f} tokens/s | peak {peak.item():.2f} GiB"
