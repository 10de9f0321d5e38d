"""Without processes: trainers' errors, padding, batches per rank, and a Trainer on one rank."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

import distflash as df
from distflash.integrations import transformers as dft
from distflash.integrations.transformers.data_ranks import DataRanks, data_ranks
from distflash.integrations.transformers.loaders import prepare_loader, seed_workers
from distflash.integrations.transformers.padding import is_padded, padded_again, unpadded, without_padding
from distflash.integrations.transformers.trainer import count_labels
from distflash.integrations.transformers.trainer_arguments import (
    arguments_problem,
    checkpoint_all_but_attention,
    class_problem,
)
from distflash.transport import Alone
from tests.tiny_models import Case, eager, relative
from tests.trainer_runs import (
    CHECKPOINTING,
    Run,
    assert_as_alone,
    finish,
    make_model,
    make_trainer,
    measured,
    process_of_ranks,
    train,
)


@pytest.fixture
def cp():
    """One rank, registered."""
    cp = df.ContextParallel(Alone())
    dft.register(cp)
    with process_of_ranks():
        yield cp
    dft.unregister()


def test_names_that_need_accelerate_or_trl_are_imported_late():
    code = "import sys, distflash.integrations.transformers as dft; assert 'trl' not in sys.modules; dft.Trainer"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'trl' not in sys.modules"], check=True, timeout=250)
    with pytest.raises(AttributeError, match="no attribute 'Trainers'"):
        dft.Trainers  # noqa: B018


@pytest.mark.timeout(300)
def test_one_rank_is_one_process(cp, tmp_path):
    run = Run(steps=3, context=1, padded=True)
    exact, nudged = (train(run, tmp_path, nudged, compute_metrics=measured) for nudged in (False, True))
    trainer = make_trainer(dft.Trainer, run, "distflash", tmp_path, context_parallel=cp, compute_metrics=measured)
    assert_as_alone([finish(trainer)], exact, nudged)


class Seeding(dft.Trainer):
    """Keeps the seeds of its batches, of training and of evaluation."""

    def shard_batch(self, inputs):
        part = super().shard_batch(inputs)
        self.seeds = [*getattr(self, "seeds", []), part["distflash"].dropout_seed]
        return part


@pytest.mark.timeout(300)
def test_every_batch_of_training_has_a_seed_of_its_own_and_a_resumed_run_the_same(cp, tmp_path):
    run = Run(steps=4, batch=2, accumulation=2, context=1, padded=True)
    options = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)

    def made():
        seeding = replace(run, options=tuple(options.items()))
        trainer = make_trainer(Seeding, seeding, "distflash", tmp_path, context_parallel=cp)
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        return trainer

    trainer = made()
    trainer.train()
    seeds = [seed for seed in trainer.seeds if seed is not None]
    assert len(set(seeds)) == len(seeds) == 8 and None in trainer.seeds
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [seed for seed in again.seeds if seed is not None] == seeds[4:]
    other = made()
    other.data_ranks = replace(other.data_ranks, rank=1)
    assert other.model.train() and other.seeded({})["dropout_seed"] not in seeds
    assert other.seeded({"dropout_seed": 3}) == {"dropout_seed": 3}


# Padding


def padded_batch():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    ids = torch.arange(1, 16).view(3, 5) * mask
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def test_padded_sequences_become_documents():
    flat = without_padding(padded_batch())
    assert flat["input_ids"].tolist() == [[1, 2, 3, 6, 7, 8, 9, 10, 11, 12]]
    assert flat["cu_seqlens"].tolist() == [0, 3, 8, 10]
    assert flat["labels"].tolist() == [[-100, 2, 3, -100, 7, 8, 9, 10, -100, 12]]


def test_what_is_put_back_stands_where_it_stood():
    batch = padded_batch()
    x = without_padding(batch)["input_ids"][..., None].float()
    assert torch.equal(padded_again(x, batch["attention_mask"])[..., 0], batch["input_ids"].float())


def test_a_row_of_padding_alone_is_no_document():
    batch = padded_batch()
    batch["attention_mask"][0] = 0
    batch["labels"][0] = -100
    assert without_padding(batch)["cu_seqlens"].tolist() == [0, 5, 7]


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.ones(3, 5)},
        {"attention_mask": torch.zeros(3, 5)},
        {"attention_mask": torch.full((3, 5), 0.5)},
        {"attention_mask": torch.ones(3, 1, 5, 5).tril()},
        {"position_ids": torch.arange(5).expand(3, 5)},
    ],
    ids=lambda change: f"{next(iter(change))} {list(next(iter(change.values())).shape)}",
)
def test_other_batches_are_left_as_they_are(change):
    batch = {**padded_batch(), **change}
    assert not is_padded(batch) and unpadded(batch) is batch


def test_labels_on_padding_are_refused():
    batch = padded_batch()
    batch["labels"][0, 4] = 3
    with pytest.raises(ValueError, match="labels: some stand on padding"):
        unpadded(batch)


def test_left_padding_changes_no_loss(cp):
    case = Case("llama", (9, 9), batch=1)
    padded = {name: x.view(2, 9) for name, x in case.inputs().items() if name != "position_ids"}
    left = {
        name: torch.nn.functional.pad(x, (2, 0), value=-100 if name == "labels" else 0) for name, x in padded.items()
    }
    left["attention_mask"] = torch.ones(2, 11, dtype=torch.int64)
    left["attention_mask"][:, :2] = 0
    loss = case.model("distflash")(**dft.shard_batch(unpadded(left), cp)).loss
    assert relative(loss, eager(case)["loss"]) <= 1e-6


# Who is given which batch

TWO_BY_TWO = ((0, 2), (1, 3))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("iterable", [False, True])
def test_batches_go_by_the_data_rank(iterable, rank):
    class Numbers(IterableDataset):
        def __iter__(self):
            return iter(range(8))

    with process_of_ranks():
        loader = DataLoader(Numbers() if iterable else range(8), batch_size=2)
        found = list(prepare_loader(Accelerator(cpu=True), loader, DataRanks(TWO_BY_TWO, rank)))
    assert torch.stack(found).tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]][rank]


def test_workers_of_a_group_are_seeded_alike():
    def seed(worker, num_workers, rank):
        return worker, num_workers, rank

    seeded = DataLoader(range(3), worker_init_fn=partial(seed, num_workers=1, rank=3))
    seed_workers(seeded, DataRanks(TWO_BY_TWO, 1))
    assert seeded.worker_init_fn(0) == (0, 1, 1)
    own = DataLoader(range(3), worker_init_fn=seed)
    seed_workers(own, DataRanks(TWO_BY_TWO, 1))
    assert own.worker_init_fn is seed


def test_labels_that_count():
    labels = torch.tensor([[3, 3, -100, 3], [-100, 3, 3, -100]])
    assert count_labels({"labels": labels}) == 4 and count_labels({"shift_labels": labels}) == 5
    assert count_labels({"input_ids": labels}) is None


def test_batches_that_one_rank_deals_out_are_refused():
    with process_of_ranks():
        accelerator = Accelerator(cpu=True)
        accelerator.dataloader_config.dispatch_batches = True
        with pytest.raises(ValueError, match="dispatch_batches: True is not supported"):
            prepare_loader(accelerator, DataLoader(range(3)), DataRanks(TWO_BY_TWO, 0))


def test_of_gathered_rows_one_of_each_group_is_kept():
    rows = torch.arange(8)  # two of each rank
    assert DataRanks(TWO_BY_TWO, 0).one_of_each(rows).tolist() == [0, 1, 2, 3]
    assert DataRanks(((0, 1), (2, 3)), 0).one_of_each(rows).tolist() == [0, 1, 4, 5]


def test_a_group_has_to_be_a_context_parallel():
    with pytest.raises(ValueError, match="context_parallel: expected a ContextParallel, got 'cp'"):
        data_ranks("cp")
    assert data_ranks(df.ContextParallel(Alone())) == DataRanks(((0,),), 0)


# What is refused


def stand_in(tp=1, compute_loss_func=None, cp_size=1, **args):
    class Trainer:
        def __init__(self):
            defaults = {"eval_use_gather_object": False, "n_gpu": 1}
            self.args = SimpleNamespace(**{**defaults, **args})
            self.compute_loss_func = compute_loss_func
            self.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=cp_size, sp_size=1))

        def get_tp_size(self):
            return tp

    return Trainer()


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        (stand_in(neftune_noise_alpha=5.0), "neftune_noise_alpha: is not supported"),
        (stand_in(predict_with_generate=True), "predict_with_generate: is not supported"),
        (stand_in(compute_loss_func=print), "compute_loss_func: is not supported"),
        (stand_in(train_sampling_strategy="batch_rebalance"), "train_sampling_strategy: 'batch_rebalance'"),
        (stand_in(eval_use_gather_object=True), "eval_use_gather_object: is not supported"),
        (stand_in(n_gpu=2), "n_gpu: 2 GPUs in one process"),
        (stand_in(tp=2), "tp_size: tensor parallelism"),
        (stand_in(cp_size=2), "parallelism_config: asks accelerate for its own"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_right_is_refused(trainer, text):
    assert arguments_problem(trainer).startswith(text)


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer", "RewardTrainer", "KTOTrainer", "RLOOTrainer"])
def test_trainers_whose_losses_are_of_sequences_are_refused_before_anything_else(name):
    kind = type("Mine", (dft.ContextParallelMixin, getattr(trl, name)), {})
    with pytest.raises(ValueError, match=f"^{name}: is not supported with context parallelism"):
        kind(context_parallel=None)


def test_what_is_right_is_not():
    assert arguments_problem(stand_in()) is None
    assert class_problem(dft.Trainer) is None and class_problem(dft.SFTTrainer) is None


def test_a_loss_of_ones_own_is_refused_by_the_trainer(cp, tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func: is not supported"):
        make_trainer(dft.Trainer, Run(), "distflash", tmp_path, context_parallel=cp, compute_loss_func=print)


# Activation checkpointing


def checkpointed(tmp_path, on=True, **kwargs):
    """The arguments of a model's checkpointed layers."""
    given = {CHECKPOINTING: on, f"{CHECKPOINTING}_kwargs": kwargs or None}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **given)
    model = make_model(Run(), "eager")
    if on:
        getattr(model, f"{CHECKPOINTING}_enable")(kwargs or None)
    checkpoint_all_but_attention(model, args)
    json.dumps(args.to_dict())  # it is written into every checkpoint
    layer = model.model.layers[0]
    return layer._gradient_checkpointing_func.keywords if layer.gradient_checkpointing else None


def test_attention_is_kept_where_layers_are_checkpointed(tmp_path):
    assert checkpointed(tmp_path, on=False) is None
    assert checkpointed(tmp_path) == {"use_reentrant": False, "context_fn": df.keep_attention}
    assert checkpointed(tmp_path, use_reentrant=True) == {"use_reentrant": True}
