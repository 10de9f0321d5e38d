"""The DeepSpeed job, in the order of execution. Options, model, data and reports are those of the main job."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import distflash as df
import distflash.integrations.deepspeed as dfd
from distflash.recipes.checkpoint import checkpoints_of
from distflash.recipes.data import Corpus
from distflash.recipes.deepspeed_checkpoint import check_engine, load_checkpoint, save_checkpoint, writer_of
from distflash.recipes.deepspeed_config import DeepSpeedConfig
from distflash.recipes.loop import AfterStep, StopSignals, loop
from distflash.recipes.model import Decoder, loss_sum
from distflash.recipes.optimizer import adamw, share_of_lr
from distflash.recipes.pipeline import pipeline_layers
from distflash.recipes.reporting import Metrics, Reporter, plot_loss
from distflash.recipes.step import Step
from distflash.recipes.together import Refused, on_lead
from distflash.recipes.trainer import (
    describe,
    metrics_of,
    prepare_out,
    run,
    title,
)
from distflash.recipes.verify import show, verify_step


def main(config: DeepSpeedConfig) -> int:
    """Run the job and return the exit code: 0 done or stopped by a signal, else that of a `JobError`."""

    def job(corpus: Corpus, device: torch.device) -> int:
        join_deepspeed(device)
        return train(config, corpus, device)

    return run(config, job)


def join_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed use the existing process group."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it even without a launcher
    if device.type == "cpu":
        # DeepSpeed's shared-memory all-reduce; compiling it takes half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


def train(config: DeepSpeedConfig, corpus: Corpus, device: torch.device) -> int:
    stop = StopSignals(device)
    lead = dist.get_rank() == 0
    try:
        job = Job.build(config, corpus, device)
    except ValueError as error:  # the same on every rank
        raise Refused(str(error)) from error
    writer = writer_of(job.engine, config.pipe)
    choice = checkpoints_of(config).choose(config.model, writer) if config.resume else None
    if choice:
        load_checkpoint(job.engine, choice.source)
    first = choice.step if choice else 0
    on_lead(lambda: prepare_out(config, choice))

    with Reporter(config, first_step=first, active=lead) as report:
        report.print(job.describe(first))
        if job.verified is not None:
            show(job.verified, report)
        after = AfterStep(config, partial(save_checkpoint, job.engine), writer, report, stop)
        loop(first, config.steps, job.step, after)
    if lead:
        print(f"loss plot: {plot_loss(config.out, title(config, job.topology.cp))}", flush=True)
    return 0


@dataclass(frozen=True)
class Job:
    """A model in a DeepSpeed engine, and its data.

    parameters: their number, over all stages. verified: the report of --verify, for the initial weights.
    """

    config: DeepSpeedConfig
    corpus: Corpus
    device: torch.device
    topology: dfd.Topology
    engine: Any
    parameters: int
    verified: df.Report | None

    @classmethod
    def build(cls, config: DeepSpeedConfig, corpus: Corpus, device: torch.device) -> "Job":
        context = dist.get_world_size() // (config.pipe * config.data_parallel)
        topology = dfd.Topology(
            pipe=config.pipe, data=config.data_parallel, context=context, layout=config.make_layout()
        )
        torch.manual_seed(config.seed)  # drawn on the CPU: the same weights on every rank and every device
        decoder = Decoder(config.model, topology.cp)
        parameters = sum(p.numel() for p in decoder.parameters())
        verified = verify_decoder(config, corpus, device, topology, decoder) if config.verify else None
        model = decoder if config.pipe == 1 else pipeline(decoder, topology, config)
        engine, *_ = dfd.initialize(
            topology,
            model=model,
            config=config.for_deepspeed(),
            optimizer=adamw(model, config.optimizer),
            lr_scheduler=partial(LambdaLR, lr_lambda=partial(share_of_lr, config.optimizer, steps=config.steps)),
        )
        check_engine(engine)
        return cls(config, corpus, device, topology, engine, parameters, verified)

    def step(self, step: int) -> Metrics:
        """One step of the optimizer, numbered from 0."""
        begin, rate = time.perf_counter(), self.engine.get_lr()[0]
        batch = self.micro_batches(step)
        loss = self.engine.train_batch(batch) if self.config.pipe > 1 else self.accumulate(batch)
        loss, norm = loss.item(), self.engine.get_global_grad_norm()
        seconds = time.perf_counter() - begin
        if norm is not None:
            norm = float(norm) if norm >= 0 else nan  # DeepSpeed returns -1 if the norm is not finite
        return metrics_of(self.config, self.device, step, loss, norm, rate, seconds)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of this rank's group, sharded to this rank's tokens."""
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
        """Forward and backward of each micro-batch and one optimizer step: `train_batch` without a pipeline."""
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
            f"DeepSpeed: {config.settings.name}, ZeRO-{self.engine.zero_optimization_stage()}{stages}, "
            f"{config.micro_batches} micro-batches of {config.micro_batch_size}"
        )


def verify_decoder(
    config: DeepSpeedConfig, corpus: Corpus, device: torch.device, topology: dfd.Topology, decoder: Decoder
) -> df.Report:
    """Verify the first step of the decoder, before DeepSpeed wraps it."""
    share = topology.data_rank, topology.data
    step = Step(config, corpus, device, topology.cp, share, "mean")
    return verify_step(step, decoder.to(device), topology.cp, 0, "mean")


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
