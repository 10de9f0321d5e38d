"""The training job, in the order of execution: options, process group, model, steps, end."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distflash as df
from distflash.recipes.checkpoint import Choice, checkpoints_of
from distflash.recipes.config import TrainConfig
from distflash.recipes.data import Corpus, open_corpus
from distflash.recipes.fsdp import ShardedGradients, shard_model
from distflash.recipes.loop import AfterStep, StopSignals, loop
from distflash.recipes.model import Decoder, flops_per_token
from distflash.recipes.optimizer import Gradients, adamw, learning_rate
from distflash.recipes.options import Placed
from distflash.recipes.reporting import Metrics, Reporter, peak_memory_gib, plot_loss, read_metrics
from distflash.recipes.step import Step
from distflash.recipes.together import Refused, end, on_lead, together
from distflash.recipes.verify import headline, show, verify_step
from distflash.recipes.weights import WRITER, load_state, save_state

# A callback (model, step function, number of steps done).
Watch = Callable[[Decoder, Step, int], None]


def main(config: TrainConfig) -> int:
    """Run the job and return the exit code: 0 done or stopped by a signal, else that of a `JobError`."""
    return run(config, lambda corpus, device: train(config, corpus, device))


def run(config: TrainConfig, job: Callable[[Corpus, torch.device], int]) -> int:
    """The exit code of `job` on the launcher's ranks, after all have opened the corpus."""
    return on_ranks(config, lambda device: job(agree(config), device))


def on_ranks(config: Placed, job: Callable[[torch.device], int]) -> int:
    """The exit code of `job` on the launcher's ranks, each on its device."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = join_group(config)
    code = end(lambda: job(device))
    # Only at an orderly end: after an error on another rank, the barrier would hang.
    dist.barrier()
    dist.destroy_process_group()
    return code


def join_group(config: Placed) -> torch.device:
    """Join the default process group (of one rank without a launcher), and return this rank's device."""
    device = torch.device(config.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=bound)
    else:
        dist.init_process_group(backend, device_id=bound, store=dist.HashStore(), rank=0, world_size=1)
    return device


def agree(config: TrainConfig) -> Corpus:
    """Open the corpus and check the output folder. Raises Refused on all ranks if any fails or has another text."""
    corpus = open_text(config)
    together(lambda: check_out(config))
    return corpus


def open_text(config: TrainConfig) -> Corpus:
    """The corpus of `--data`. Raises Refused on all ranks if any cannot read it or has another text."""
    corpora: list[Corpus] = []

    def look() -> str:
        config.check_ranks(dist.get_world_size())
        corpora.append(open_corpus(config.data, config.seq_len))
        return corpora[0].fingerprint()

    check_same(together(look), "--data")
    return corpora[0]


def check_same(fingerprints: list[str], option: str) -> None:
    """Raise Refused on all ranks if they do not have the same text. fingerprints: of all ranks' corpora."""
    others = [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]
    if others:
        raise Refused(
            {f"{option}: file names or sizes differ from those on rank 0; give every rank the same text": others[0]}
        )


def check_out(config: TrainConfig) -> None:
    """Raise a ValueError if --out is no folder, has nothing to resume from, or has a run that would be lost."""
    checkpoints = checkpoints_of(config)
    check_folder(config.out)
    check_folder(checkpoints.folder)
    metrics = config.out / "metrics.jsonl"
    if metrics.exists() and not metrics.is_file():
        raise ValueError(f"--out: {metrics} is no file; move it away, or name another --out")
    newest = next(iter(checkpoints.complete()), None)
    if config.resume:
        if newest is None:
            raise ValueError(f"--resume: {config.out} holds no checkpoint; leave --resume out, or name another --out")
        read_metrics(metrics)
    elif newest is not None and not config.overwrite:
        raise ValueError(
            f"--out: {config.out} holds a run with the checkpoint {newest.name}; pass --resume to continue it, "
            "--overwrite to delete it, or name another --out"
        )


def check_folder(path: Path) -> None:
    """Raise a ValueError if `path` is no writable folder and cannot be created as one."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise ValueError(f"--out: {there} is no folder; move it away, or name another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out: {there} may not be written to; change its permissions, or name another --out")


def no_watch(model: Decoder, forward_backward: Step, done: int) -> None:
    """The default callback of `train`: does nothing."""


def train(config: TrainConfig, corpus: Corpus, device: torch.device, watch: Watch = no_watch) -> int:
    """Run the training. watch: called on all ranks before the first step and after each one."""
    stop = StopSignals(device)
    start = prepare(config, corpus, device)
    lead, first = dist.get_rank() == 0, start.first
    on_lead(lambda: prepare_out(config, start.choice))

    with Reporter(config, first_step=first, active=lead) as report:
        report.print(start.describe())
        verified = start.verify(report) if config.verify else None

        def step(number: int) -> Metrics:
            metrics = optimizer_step(start.forward_backward, start.model, start.gradients, start.optimizer, number)
            watch(start.model, start.forward_backward, number + 1)
            return metrics

        watch(start.model, start.forward_backward, first)
        save = partial(save_state, model=start.model, optimizer=start.optimizer)
        loop(first, config.steps, step, AfterStep(config, save, WRITER, report, stop))
    if lead:
        print(f"loss plot: {plot_loss(config.out, title(config, start.cp))}")
        if verified is not None:
            print(headline(verified), flush=True)
    return 0


@dataclass(frozen=True)
class Start:
    """The state at the start of a run. choice: the checkpoint that it resumes from, already loaded."""

    choice: Choice | None
    cp: df.ContextParallel
    model: Decoder
    optimizer: torch.optim.AdamW
    gradients: Gradients | ShardedGradients
    forward_backward: Step

    @property
    def first(self) -> int:
        """The number of the first step."""
        return self.choice.step if self.choice else 0

    def describe(self) -> str:
        step, parameters = self.forward_backward, sum(p.numel() for p in self.model.parameters())
        return describe(step.config, step.corpus, parameters, self.cp, self.first)

    def verify(self, report: Reporter) -> df.Report:
        """Verify the first step, and print the report. All ranks call. Raises like `show`."""
        reduction: Literal["sum"] | None = None if self.forward_backward.config.fsdp else "sum"
        verified = verify_step(self.forward_backward, self.model, self.cp, self.first, reduction)
        show(verified, report)
        return verified


def prepare(config: TrainConfig, corpus: Corpus, device: torch.device) -> Start:
    """Build the model, and load the checkpoint if the run resumes. All ranks call."""
    choice = checkpoints_of(config).choose(config.model, WRITER) if config.resume else None
    mesh = mesh_of(config, device)
    cp = df.ContextParallel(mesh["context"], layout=config.make_layout(), schedule=df.Ring())
    model, optimizer = build(config, cp, device)
    if choice:
        load_state(choice.source, model, optimizer)
    gradients = ShardedGradients(model) if config.fsdp else Gradients(model)
    share = mesh.get_local_rank("data"), config.data_parallel
    return Start(choice, cp, model, optimizer, gradients, Step(config, corpus, device, cp, share, gradients.reduction))


def mesh_of(config: TrainConfig, device: torch.device) -> DeviceMesh:
    shape = (config.data_parallel, dist.get_world_size() // config.data_parallel)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))


def build(config: TrainConfig, cp: df.ContextParallel, device: torch.device) -> tuple[Decoder, torch.optim.AdamW]:
    """The initialised model, sharded with --fsdp, and its optimizer."""
    torch.manual_seed(config.seed)  # drawn on the CPU: the same weights on every rank and every device
    model = Decoder(config.model, cp).to(device)
    if config.fsdp:
        shard_model(model, config.compute_dtype)
    return model, adamw(model, config.optimizer)


def optimizer_step(
    forward_backward: Step,
    model: Decoder,
    gradients: Gradients | ShardedGradients,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> Metrics:
    config = forward_backward.config
    begin = time.perf_counter()
    gradients.zero()
    loss = forward_backward(model, step)
    gradients.combine()
    norm = gradients.clip(config.optimizer.grad_clip)
    rate = learning_rate(config.optimizer, step, config.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    numbers = loss.item(), norm.item()  # waits for the device, so the clock below sees the whole step
    seconds = time.perf_counter() - begin
    return metrics_of(config, forward_backward.device, step, *numbers, rate, seconds)


def metrics_of(
    config: TrainConfig,
    device: torch.device,
    step: int,
    loss: float,
    grad_norm: float | None,
    lr: float,
    seconds: float,
) -> Metrics:
    """The metrics of a step, numbered from 0, over all ranks."""
    tokens = config.batch_size * config.seq_len
    flops = tokens * flops_per_token(config.model, config.seq_len, config.vocabulary)
    return Metrics(
        step=step + 1,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        tflops_per_rank=flops / seconds / dist.get_world_size() / 1e12,
        peak_memory_gib=peak_memory_gib(device),
    )


def prepare_out(config: TrainConfig, choice: Choice | None) -> None:
    """On rank 0: create the folder, and delete what this run does not continue from."""
    for line in choice.set_aside() if choice else ():
        print(line, file=sys.stderr, flush=True)
    if config.overwrite:  # only what a run writes: the folder may have other files
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    if not config.resume:
        (config.out / "metrics.jsonl").unlink(missing_ok=True)
    config.out.mkdir(parents=True, exist_ok=True)


def describe(config: TrainConfig, corpus: Corpus, parameters: int, cp: df.ContextParallel, first: int) -> str:
    flops = flops_per_token(config.model, config.seq_len, config.vocabulary)
    lines = [
        f"data: {len(corpus.files)} documents, {corpus.size / 1e6:.1f} MB",
        f"model: {parameters / 1e6:.2f} M parameters, {flops / 1e6:.1f} MFLOP a token",
        f"ranks: {ranks_of(config, cp)}, {config.layout} layout, {config.batch_size} x {config.seq_len} tokens a step, "
        f"{config.compute_dtype} on {config.device_type}",
    ]
    if first:
        lines.append(f"resumed after step {first}")
    return "\n".join(lines)


def title(config: TrainConfig, cp: df.ContextParallel) -> str:
    shape = f"{config.model.layers} layers, dim {config.model.dim}, {config.batch_size} x {config.seq_len} tokens"
    ranks = f"{ranks_of(config, cp)} rank{'s' * (dist.get_world_size() > 1)}"
    return f"Byte-level decoder, {shape}, {config.layout} over {ranks}"


def ranks_of(config: TrainConfig, cp: df.ContextParallel) -> str:
    """The ranks in words: data x context, and FSDP."""
    groups = f"{config.data_parallel} x " * (config.data_parallel > 1)
    return f"{groups}{cp.world_size}{' (FSDP)' * config.fsdp}"
