"""The run on DeepSpeed, in the order of its execution. Options, model, data and reports are those of the main job."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import distflash.integrations.deepspeed as dfd
from launch.checkpoint import step_of
from launch.data import Corpus
from launch.deepspeed_config import DeepSpeedConfig
from launch.model import Decoder, loss_sum
from launch.optimizer import adamw, learning_rate
from launch.pipeline import pipeline_layers
from launch.reporting import Metrics, Reporter, plot_loss
from launch.trainer import (
    StopSignals,
    agree,
    checkpoints_of,
    describe,
    join_group,
    metrics_of,
    prepare_out,
    title,
)

# DeepSpeed's name for what it writes to a folder of its own, which is a checkpoint's here.
TAG = "state"


def main(config: DeepSpeedConfig) -> int:
    """Run the job and return the exit code: 0 done or stopped by a signal, 2 refused."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = join_group(config)
    join_deepspeed(device)
    corpus = agree(config)
    code = 2 if corpus is None else train(config, corpus, device)
    dist.barrier()
    dist.destroy_process_group()
    return code


def join_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed use the process group that there is."""
    os.environ.setdefault("LOCAL_RANK", "0")  # which it reads, with or without a launcher
    if device.type == "cpu":
        # An all-reduce of its own in shared memory, which would be compiled first, for half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


def train(config: DeepSpeedConfig, corpus: Corpus, device: torch.device) -> int:
    stop, checkpoints = StopSignals(device), checkpoints_of(config)
    lead = dist.get_rank() == 0
    source = checkpoints.newest() if config.resume else None
    try:
        job = Job.build(config, corpus, device)
        first = job.load(source) if source else 0
    except ValueError as error:  # the same on every rank
        if lead:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if lead:
        prepare_out(config)
    dist.barrier()

    with Reporter(config, first_step=first, active=lead) as report:
        report.print(job.describe(first))
        for step in range(first, config.steps):
            report.step(job.step(step))
            stopped, done = stop.agreed(), step + 1
            due = config.checkpoint_every and done % config.checkpoint_every == 0
            if stopped or due or done == config.steps:
                with checkpoints.writing(done, config.model) as folder:
                    job.engine.save_checkpoint(folder, tag=TAG)
                report.print(f"checkpoint: {checkpoints.folder / f'step-{done:08d}'}")
            if stopped:
                report.print(f"stopped by a signal after step {done}; --resume continues")
                break
    if lead:
        print(f"loss plot: {plot_loss(config.out, title(config, job.topology.cp))}", flush=True)
    return 0


@dataclass(frozen=True)
class Job:
    """A model on an engine of DeepSpeed, and its data. parameters: how many the model has, on all stages."""

    config: DeepSpeedConfig
    corpus: Corpus
    device: torch.device
    topology: dfd.Topology
    engine: Any
    parameters: int

    @classmethod
    def build(cls, config: DeepSpeedConfig, corpus: Corpus, device: torch.device) -> "Job":
        context = dist.get_world_size() // (config.pipe * config.data_parallel)
        topology = dfd.Topology(
            pipe=config.pipe, data=config.data_parallel, context=context, layout=config.make_layout()
        )
        torch.manual_seed(config.seed)  # drawn on the CPU: the same weights on every rank and every device
        decoder = Decoder(config.model, topology.cp)
        parameters = sum(p.numel() for p in decoder.parameters())
        model = decoder if config.pipe == 1 else pipeline(decoder, topology, config)
        engine, *_ = dfd.initialize(
            topology,
            model=model,
            config=config.for_deepspeed(),
            optimizer=adamw(model, config.optimizer),
            lr_scheduler=partial(LambdaLR, lr_lambda=partial(share_of_lr, config)),
        )
        return cls(config, corpus, device, topology, engine, parameters)

    def load(self, source: Path) -> int:
        """Read a checkpoint that was written on as many ranks and stages; the number of steps it had taken."""
        loaded, _ = self.engine.load_checkpoint(source, tag=TAG)
        if loaded is None:
            raise ValueError(
                f"--resume: {source} was not written by DeepSpeed on these ranks; resume with the program, --deepspeed "
                "and --pipe that wrote it, or name another --out"
            )
        return step_of(source)

    def step(self, step: int) -> Metrics:
        """One step of the optimizer, numbered from 0."""
        begin, rate = time.perf_counter(), self.engine.get_lr()[0]
        batch = self.micro_batches(step)
        loss = self.engine.train_batch(batch) if self.config.pipe > 1 else self.accumulate(batch)
        loss, norm = loss.item(), self.engine.get_global_grad_norm()
        seconds = time.perf_counter() - begin
        # Without ZeRO, DeepSpeed does not tell the norm.
        return metrics_of(self.config, self.device, step, loss, nan if norm is None else float(norm), rate, seconds)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's tokens of its group's share of a batch, a micro-batch at a time."""
        config, topology = self.config, self.topology
        tokens, labels = self.corpus.batch(
            seed=config.seed,
            step=step,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            positions=topology.cp.positions(config.seq_len),
            share=(topology.data_rank, topology.data),
        )
        size = config.micro_batch_size
        return zip(tokens.to(self.device).split(size), labels.to(self.device).split(size), strict=True)

    def accumulate(self, batch: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """What `train_batch` is to a pipeline: forward and backward of each micro-batch, one step of the optimizer."""
        losses = []
        for tokens, labels in batch:
            logits = self.engine(tokens, self.config.seq_len)
            loss = self.topology.mean(loss_sum(logits, labels), labels.numel())
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def describe(self, first: int) -> str:
        config = self.config
        stages = f", {config.pipe} stages" if config.pipe > 1 else ""
        return (
            f"{describe(config, self.corpus, self.parameters, self.topology.cp, first)}\n"
            f"DeepSpeed: {config.deepspeed.name}, ZeRO-{self.engine.zero_optimization_stage()}{stages}, "
            f"{config.micro_batches} micro-batches of {config.micro_batch_size}"
        )


def pipeline(decoder: Decoder, topology: dfd.Topology, config: DeepSpeedConfig) -> nn.Module:
    checkpoint = non_reentrant_checkpoint if config.model.recompute_attention else dfd.checkpoint_layers
    return dfd.pipeline_module(
        topology,
        pipeline_layers(decoder, topology.cp, config.seq_len),
        loss_fn=dfd.CausalLoss(topology),
        activation_checkpoint_interval=int(config.model.checkpoint_activations),
        activation_checkpoint_func=checkpoint,
        checkpointable_layers=[dfd.DecoderBlock.__name__],
    )


def share_of_lr(config: DeepSpeedConfig, step: int) -> float:
    # The scheduler asks for the step after the last, too.
    return learning_rate(config.optimizer, min(step, config.steps - 1), config.steps) / config.optimizer.lr
