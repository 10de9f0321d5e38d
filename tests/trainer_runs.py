"""Tiny runs of the trainers of Transformers and TRL: unchanged on one process, and over ranks with distflash."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

import distflash as df
from tests.tiny_models import CONFIGS
from tests.training import SIGMAS, nudge

IGNORED = -100
VOCABULARY = 48
# What newer versions of the library call it.
IS_NEW = hasattr(TrainingArguments, "activation_checkpointing")
CHECKPOINTING = "activation_checkpointing" if IS_NEW else "gradient_checkpointing"


@dataclass(frozen=True)
class Run:
    """What is trained, then how it is spread over ranks. options: further arguments of the trainer.

    batch: sequences of a micro-batch, of all data ranks together. stream: whether the data set is an iterable one.
    rounded: whether frozen weights have values of bfloat16; kept: whether they are kept in it, as 16-bit bases are.
    """

    options: tuple[tuple[str, Any], ...] = ()
    optimizer: str = "sgd"
    clip: float = 0.0
    steps: int = 10
    batch: int = 2
    accumulation: int = 3
    family: str = "llama"
    padded: bool = False
    lora: bool = False
    rounded: bool = False
    kept: bool = False
    stream: bool = False

    data: int = 1
    context: int = 2
    fsdp: bool = False

    @property
    def ranks(self) -> int:
        return self.data * self.context


@dataclass(frozen=True)
class Outcome:
    """What a trainer logged of each step and at the end, and its weights by name."""

    logged: dict[str, list[float]]
    weights: dict[str, Tensor]
    summary: dict[str, float]


def sequences(run: Run, count: int, seq_len: int = 29) -> list[dict[str, list[int]]]:
    """Sequences of which very different shares of the tokens are labels; if they are padded, of different lengths."""
    generator = torch.Generator().manual_seed(5)

    def sequence(n: int) -> dict[str, list[int]]:
        length = seq_len - 3 * (n % 4) if run.padded else seq_len
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[torch.rand(length, generator=generator) < 0.85 * (n % 5) / 4] = IGNORED
        missing = seq_len - length
        return {
            "input_ids": ids.tolist() + [0] * missing,
            "labels": labels.tolist() + [IGNORED] * missing,
            "attention_mask": [1] * length + [0] * missing,
        }

    return [sequence(n) for n in range(count)]


def arguments(run: Run, folder: Path, **others: Any) -> dict[str, Any]:
    """The trainer's arguments of a run, but for the number of ranks."""
    rates = {"sgd": 0.1, "adamw_torch": 3e-3}
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_first_step": True,
        "optim": run.optimizer,
        "learning_rate": rates[run.optimizer],
        # Adam's update of a gradient that is rounding and nothing else would be as large as any other: hence the eps.
        "adam_epsilon": 1e-4,
        "lr_scheduler_type": "linear",
        "max_grad_norm": run.clip,
        "max_steps": run.steps,
        "gradient_accumulation_steps": run.accumulation,
        "per_device_train_batch_size": run.batch // run.data,
        "per_device_eval_batch_size": run.batch // run.data,
        "include_num_input_tokens_seen": "all",
        **dict(run.options),
        **others,
    }


@contextmanager
def process_of_ranks() -> Iterator[None]:
    """What torchrun sets for a rank, where accelerate looks for it; and no state of a run before."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = dict(os.environ)  # the library sets more of them, by its arguments
    if dist.is_initialized():
        rank, world = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= dict(zip(names, (rank, world, rank, world, "localhost", "29511"), strict=True))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def make_model(run: Run, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[run.family](), attn_implementation=attention)
    if not run.lora:
        return model
    from peft import LoraConfig, get_peft_model

    if run.rounded or run.kept:
        model = model.to(torch.bfloat16)
    if run.rounded:
        model = model.to(torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@contextmanager
def registered(run: Run) -> Iterator[df.ContextParallel]:
    """The group of a run's ranks that this rank holds sequences with."""
    from distflash.integrations import transformers as dft

    mesh = init_device_mesh("cpu", (run.data, run.context), mesh_dim_names=("data", "context"))
    cp = df.ContextParallel(mesh["context"])
    dft.register(cp)
    try:
        yield cp
    finally:
        dft.unregister()


class Stream(IterableDataset[dict[str, list[int]]]):
    """Sequences one after the other, of a number that is not known."""

    def __init__(self, sequences: list[dict[str, list[int]]]) -> None:
        self.sequences = sequences

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return iter(self.sequences)


def collator(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([each[name] for each in examples]) for name in examples[0]}


def measured(prediction: Any) -> dict[str, float]:
    """A metric of whole logits and labels: of each label the logit before it."""
    labels = prediction.label_ids[:, 1:]
    counts = labels != IGNORED
    logits = prediction.predictions[:, :-1][counts]
    right = logits.argmax(-1) == labels[counts]
    return {"accuracy": float(right.mean()), "labels": float(counts.sum()), "logits": float((logits**2).sum())}


def train(run: Run, folder: Path, nudged: bool = False, **others: Any) -> Outcome:
    """On one process, by the library alone.

    nudged: whether every weight is moved by one rounding unit before each step.
    """
    from transformers import Trainer

    with process_of_ranks():
        trainer = make_trainer(Trainer, run, "eager", folder, nudged=nudged, **others)
        return finish(trainer)


def train_on_rank(run: Run, folder: Path, **others: Any) -> Outcome:
    """Runs as a rank."""
    from distflash.integrations import transformers as dft

    with process_of_ranks(), registered(run) as cp:
        kind = fully_sharded(dft.Trainer) if run.fsdp else dft.Trainer
        trainer = make_trainer(kind, run, "distflash", folder, context_parallel=cp, **others)
        return finish(trainer)


def fully_sharded(kind: Any, layer: str = "LlamaDecoderLayer") -> Any:
    """A trainer whose accelerator takes to FSDP2, which accelerate does on GPUs only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    class Sharded(kind):  # type: ignore[misc]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
            self.accelerator.state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=[layer],
            )
            self.is_fsdp_enabled = True

    return Sharded


def make_trainer(kind: Any, run: Run, attention: str, folder: Path, nudged: bool = False, **others: Any) -> Any:
    trainer = kind(
        make_model(run, attention),
        TrainingArguments(**arguments(run, folder)),
        # Data ranks fill their last batches up with the first sequences, which one process does not: so none is left.
        train_dataset=Stream(sequences(run, 40)) if run.stream else sequences(run, 40),
        eval_dataset=sequences(run, 7 if run.batch == 2 else 8),
        data_collator=collator,
        **others,
    )
    if nudged:
        trainer.add_callback(nudging())
    return trainer


def finish(trainer: Any, **options: Any) -> Outcome:
    summary = trainer.train(**options).metrics
    summary = {**summary, **trainer.evaluate()}
    if not trainer.is_deepspeed_enabled:  # under ZeRO-3 the library does not count all weights
        summary["total_flos"] = trainer.state.total_flos
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    logged = {name: [float(entry[name]) for entry in steps] for name in steps[0]}
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in model.named_parameters()
    }
    return Outcome(logged, weights, {name: float(x) for name, x in summary.items()})


def nudging() -> Any:
    from transformers import TrainerCallback

    class Nudging(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            nudge(model, state.global_step)

    return Nudging()


# What depends on the clock, or is not of the training.
_CLOCK = ("second", "runtime", "time")


def assert_as_alone(got: Sequence[Outcome], exact: Outcome, nudged: Outcome) -> None:
    """Assert that each rank's logs and weights equal those of one process, up to rounding.

    The effect of rounding is measured by a run whose weights are moved by one rounding unit before every step.
    """
    unit = torch.finfo(torch.float32).eps
    for outcome in got:
        assert outcome.weights.keys() == exact.weights.keys()
        found, limit = worst(outcome.weights, exact.weights), SIGMAS * max(unit, worst(nudged.weights, exact.weights))
        assert found <= limit, f"weights: {found:.1e}, limit {limit:.1e}"
        assert outcome.logged.keys() == exact.logged.keys()
        for name in without_clock(exact.logged):
            limit = SIGMAS * max(unit, relative(nudged.logged[name], exact.logged[name]))
            found = relative(outcome.logged[name], exact.logged[name])
            assert found <= limit, (
                f"{name}: {found:.1e}, limit {limit:.1e}: {outcome.logged[name]} {exact.logged[name]}"
            )
        assert exact.summary.keys() - outcome.summary.keys() <= {"total_flos"}
        for name in without_clock(outcome.summary):
            limit = SIGMAS * max(4 * unit, relative([nudged.summary[name]], [exact.summary[name]]))
            values = outcome.summary[name], exact.summary[name]
            assert relative(values[:1], values[1:]) <= limit, f"{name}: {values}"


def without_clock(names: Any) -> list[str]:
    return [name for name in names if not any(part in name for part in _CLOCK)]


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(apart(x, b[name]) for name, x in a.items())


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def relative(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference, relative to the largest value; NaN counts as infinite."""
    x, y = torch.tensor(a).double(), torch.tensor(b).double()
    if x.shape != y.shape:
        return float("inf")
    return float(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).nan_to_num(torch.inf))


@dataclass(frozen=True)
class Loop:
    """What a hand-written loop of accelerate had of each step."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, Tensor]


def accelerate_loop(run: Run, on_ranks: bool) -> Loop:
    """Runs as a rank, or on one process: the usual loop, in which one line differs."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from distflash.integrations import transformers as dft

    with process_of_ranks(), registered(run) if on_ranks else nullcontext() as cp:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=run.accumulation)
        model = make_model(run, "distflash" if on_ranks else "eager")
        data = run.data if on_ranks else 1
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, run.steps * data)
        loader: Any = DataLoader(sequences(run, 24), run.batch // data, collate_fn=collator)  # type: ignore[arg-type]
        objects = (model, optimizer, loader, scheduler)
        if cp is None:
            return loop(run, accelerator, *accelerator.prepare(*objects), lambda loss: loss)
        world = dist.group.WORLD
        if data > 1:  # the mean over all labels, where each group's mean is the default
            model.loss_function = dft.loss_function(cp, group=world)
        prepared = dft.prepare(accelerator, *objects, context_parallel=cp)
        return loop(run, accelerator, *prepared, lambda loss: cp.mean(loss, 1, reduction="mean", group=world))


def loop(run: Run, accelerator: Any, model: Any, optimizer: Any, loader: Any, scheduler: Any, mean: Any) -> Loop:
    made = Loop([], [], [], {})
    while len(made.norms) < run.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                made.losses.append(mean(loss.detach()).item())
                if accelerator.sync_gradients:
                    made.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), run.clip or torch.inf)))
                optimizer.step()
                scheduler.step()
                made.rates.append(scheduler.get_last_lr()[0])
                optimizer.zero_grad()
    made.weights.update({name: p.detach().clone() for name, p in accelerator.unwrap_model(model).named_parameters()})
    return made
