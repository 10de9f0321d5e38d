"""The job on `dft.Trainer`, with a Llama of Transformers. Options, data, reports and checkpoints are the main job's.

Callbacks load the checkpoint and run --verify before the first step, and report and save after each step.
"""

import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler, default_collate
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

import distflash as df
from distflash.integrations import transformers as dft
from distflash.recipes.checkpoint import Choice, checkpoints_of
from distflash.recipes.data import Corpus
from distflash.recipes.loop import AfterStep, StopSignals
from distflash.recipes.optimizer import share_of_lr
from distflash.recipes.reporting import Metrics, Reporter, peak_memory_gib, plot_loss
from distflash.recipes.together import on_lead
from distflash.recipes.torch_attention import TorchAttention
from distflash.recipes.trainer import describe, mesh_of, metrics_of, prepare_out, run
from distflash.recipes.transformers_config import TransformersConfig
from distflash.recipes.transformers_model import Llama, build, unsharded
from distflash.recipes.verify import show, verify_run
from distflash.recipes.weights import load_state, save_state

WRITER = "launch/train_transformers.py"
# Steps excluded from the rate, in which memory pools grow and kernels are compiled.
WARM_UP = 2


def main(config: TransformersConfig) -> int:
    """Run the job and return the exit code: 0 done or stopped by a signal, else that of a `JobError`."""
    return run(config, lambda corpus, device: train(config, corpus, device))


def train(config: TransformersConfig, corpus: Corpus, device: torch.device) -> int:
    stop, lead = StopSignals(device), dist.get_rank() == 0
    config = replace(config, fsdp=device.type == "cuda" and "LOCAL_RANK" in os.environ)  # accelerate's condition
    choice = checkpoints_of(config).choose(config.model, WRITER) if config.resume else None
    on_lead(lambda: prepare_out(config, choice))
    first = choice.step if choice else 0
    mesh = mesh_of(config, device)
    cp = df.ContextParallel(mesh["context"], layout=config.make_layout())
    attention = TorchAttention(mesh["context"], config.repeat_kv) if config.attention == "torch" else None
    if attention is None:
        dft.register(cp)
    model = build(config, attention, device)
    with Reporter(config, first_step=first, active=lead) as report:
        report.print(describe(config, corpus, sum(p.numel() for p in model.parameters()), cp, first))
        job = JobTrainer(config, Sequences(config, corpus, first), model, cp, attention)
        steps = Steps(job, device, choice, AfterStep(config, job.save, WRITER, report, stop))
        job.add_callback(steps)
        if first < config.steps:
            job.train()
            report.print(summary(steps.made, device))
    if lead:
        title = f"Llama of Transformers, {config.attention}, {config.batch_size} x {config.seq_len} tokens"
        print(f"loss plot: {plot_loss(config.out, title)}", flush=True)
    return 0


class Sequences(Dataset[dict[str, Tensor]]):
    """The sequences of all steps from `first` on, in order."""

    def __init__(self, config: TransformersConfig, corpus: Corpus, first: int) -> None:
        self.config, self.corpus, self.first = config, corpus, first

    def __len__(self) -> int:
        return (self.config.steps - self.first) * self.config.batch_size

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """input_ids and shift_labels, int64 [S]."""
        config = self.config
        step, sequence = divmod(n, config.batch_size)
        tokens, labels = self.corpus.batch(
            seed=config.seed,
            step=self.first + step,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            positions=torch.arange(config.seq_len),
            share=(sequence, config.batch_size),
        )
        return {"input_ids": tokens[0], "shift_labels": labels[0]}


class JobTrainer(dft.Trainer):
    """The trainer with the job's data order, learning rate and precision."""

    def __init__(
        self,
        config: TransformersConfig,
        data: Sequences,
        model: Llama,
        cp: df.ContextParallel,
        attention: TorchAttention | None,
    ) -> None:
        self.config, self.data, self.attention = config, data, attention
        arguments = training_arguments(config, config.steps - data.first)
        super().__init__(model, arguments, context_parallel=cp, train_dataset=data, data_collator=default_collate)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.data)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        config, first = self.config, self.data.first
        rate = partial(share_of_lr, config.optimizer, steps=config.steps)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: rate(first + step))
        return self.lr_scheduler

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.config.fsdp:  # gradients are reduced in float32
            policy = MixedPrecisionPolicy(param_dtype=self.config.compute_dtype, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        step = super().training_step
        if self.attention is None:
            return step(model, inputs, num_items_in_batch)
        with self.attention.sharded(self._prepare_input(inputs), self.context_parallel) as part:
            return step(model, part, num_items_in_batch)

    @property
    def body(self) -> nn.Module:
        """The model without its head, which shares the embedding's weights."""
        return self.accelerator.unwrap_model(self.model).model

    def save(self, folder: Path) -> None:
        save_state(folder, self.body, without_accelerate(self.optimizer))

    def replay(self, step: int, cp: df.ContextParallel | None) -> Tensor:
        """Forward and backward of a step, for `df.verify`. Returns the mean loss over all tokens of all ranks.

        `cp=None`: this rank holds the whole batch, and uses SDPA.
        """
        config, ranks = self.config, self.data_ranks
        size = config.batch_size // (1 if cp is None else ranks.count)
        begin = step * config.batch_size + (0 if cp is None else ranks.rank * size)
        batch = default_collate([self.data[begin + n] for n in range(size)])
        if cp is None:
            whole = self._prepare_input(batch)
            with unsharded(self.accelerator.unwrap_model(self.model)):
                loss = self.model_wrapped(**whole, num_items_in_batch=whole["shift_labels"].numel()).loss
                self.accelerator.backward(loss)
            return loss.detach()
        [batch], count = self.get_batch_samples(iter([batch]), 1, self.args.device)
        loss = self.training_step(self.model_wrapped, batch, count)
        return cp.mean(loss, 1, reduction="mean", group=dist.group.WORLD)


def without_accelerate(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def training_arguments(config: TransformersConfig, steps: int) -> TrainingArguments:
    optimizer = config.optimizer
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return TrainingArguments(
        str(config.out),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size // config.data_parallel,
        optim="adamw_torch",
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.grad_clip,
        seed=config.seed % 2**32,
        use_cpu=config.device_type == "cpu",
        bf16=config.compute_dtype == torch.bfloat16 and not config.fsdp,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter would hide NaN
        save_strategy="no",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=config.device_type == "cuda",
        **({"fsdp": "full_shard", "fsdp_config": fsdp} if config.fsdp else {}),
    )


class Steps(TrainerCallback):
    """What every job does before the first step and after each one."""

    def __init__(self, job: JobTrainer, device: torch.device, choice: Choice | None, after: AfterStep) -> None:
        self.job, self.device, self.choice, self.after = job, device, choice, after
        self.made: list[Metrics] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        job = self.job
        if self.choice:
            load_state(self.choice.source, job.body, without_accelerate(job.optimizer))
        if job.config.verify:
            show(verify_run(job.replay, job.body, job.context_parallel, 0, None), self.after.report)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "grad_norm" not in logs:  # of the whole run
            return
        seconds = time.perf_counter() - self.begin  # logging the loss has synchronised
        number = self.job.data.first + state.global_step - 1
        numbers = logs["loss"], float(logs["grad_norm"]), logs["learning_rate"]
        self.made.append(metrics_of(self.job.config, self.device, number, *numbers, seconds))
        if self.after(self.made[-1]):
            control.should_training_stop = True


def summary(made: list[Metrics], device: torch.device) -> str:
    """The median rate, and the largest peak memory of any rank. All ranks call."""
    peak = torch.tensor(peak_memory_gib(device), device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    rate = statistics.median(m.tokens_per_second for m in made[min(WARM_UP, len(made) - 1) :])
    return f"median {rate:,.0f} tokens/s | peak {peak.item():.2f} GiB"
