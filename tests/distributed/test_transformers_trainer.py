"""Trainers over real ranks: losses, gradient norms, weights and logs equal those of one process."""

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.sft_runs import ASSISTANT_ONLY, PACKED, PADDED, PADDING_FREE, WRAPPED, fine_tune, fine_tune_on_rank
from tests.trainer_runs import (
    CHECKPOINTING,
    Run,
    accelerate_loop,
    assert_as_alone,
    finish,
    make_trainer,
    measured,
    process_of_ranks,
    registered,
    relative,
    train,
    train_on_rank,
    worst,
)
from tests.training import join_deepspeed

PRELOAD = "distflash.integrations.transformers.sft"
# Between the norms of the gradients of batches of two and of four: some steps are clipped and others are not.
CLIP, CLIP_OF_FOUR = 2.6, 1.9
CHECKPOINTED = ((CHECKPOINTING, True),)
REENTRANT = (*CHECKPOINTED, (f"{CHECKPOINTING}_kwargs", {"use_reentrant": True}))
SMOOTHED = (("label_smoothing_factor", 0.2),)
EACH_GROUPS_OWN = (("average_tokens_across_devices", False),)
COMPILED = (("torch_compile", True), ("torch_compile_backend", "aot_eager"))
OPTIMIZERS = ("sgd", "adamw_torch")

STREAM = Run(stream=True)
RUNS = [
    Run(),
    Run(optimizer="adamw_torch", clip=CLIP_OF_FOUR, data=2, batch=4, options=CHECKPOINTED),
    Run(padded=True, context=3, options=SMOOTHED),
]
MORE_RUNS = [
    *(Run(optimizer=optimizer, clip=clip) for optimizer in OPTIMIZERS for clip in (0.0, CLIP)),
    *(Run(optimizer=optimizer, clip=CLIP, context=3, padded=True) for optimizer in OPTIMIZERS),
    *(Run(optimizer=optimizer, clip=clip, data=2, batch=4) for optimizer in OPTIMIZERS for clip in (0.0, CLIP_OF_FOUR)),
    Run(family="gpt_oss", padded=True, options=CHECKPOINTED),
    Run(options=REENTRANT),
    Run(data=2, batch=4, padded=True, options=SMOOTHED),
    Run(options=EACH_GROUPS_OWN),
    Run(options=(("train_sampling_strategy", "group_by_length"),), padded=True),
    STREAM,
    Run(stream=True, data=2, batch=4),
    Run(lora=True, options=CHECKPOINTED),
]
# How ranks keep weights and compute, which makes no difference to one process's run.
SPREAD = [
    Run(fsdp=True),
    Run(fsdp=True, data=2, batch=4, clip=CLIP_OF_FOUR, optimizer="adamw_torch"),
    Run(fsdp=True, lora=True, options=CHECKPOINTED),
    Run(options=COMPILED, steps=5),
]
BATCH = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
ZERO = [Run(options=(("deepspeed", {**BATCH, "zero_optimization": {"stage": stage}}),)) for stage in (1, 2, 3)]

FINE_TUNED = [Run(options=PACKED, steps=6)]
MORE_FINE_TUNED = [
    *(Run(options=options) for options in (PACKED, WRAPPED, PADDING_FREE, PADDED, ASSISTANT_ONLY)),
    Run(options=PACKED, optimizer="adamw_torch", clip=1.8, context=3),
    Run(options=PADDING_FREE, data=2, batch=4),
]


KNOWN = {}


def alone(run, nudged=False):
    """The run on one process; it does not depend on how the same is spread over ranks."""
    if (key := (str(run), nudged)) not in KNOWN:
        with TemporaryDirectory() as folder:
            KNOWN[key] = train(run, Path(folder), nudged, compute_metrics=measured)
    return KNOWN[key]


def of_one_process(run, options=None):
    run = replace(run, data=1, context=1, fsdp=False, options=run.options if options is None else options)
    return alone(run), alone(run, nudged=True)


def load():
    """Runs as a rank: what a trainer imports takes many seconds, for which a call of its own has its own time limit."""
    from distflash.integrations.transformers import SFTTrainer

    return SFTTrainer.__name__


@pytest.fixture
def ranks_of(ranks_of):
    """Ranks that have loaded the trainers."""

    def loaded(count):
        ranks = ranks_of(count)
        assert ranks.run(load) == ["SFTTrainer"] * count
        return ranks

    return loaded


def on_rank(run, folder):
    """Runs as a rank."""
    if "deepspeed" in dict(run.options):
        join_deepspeed()
    return train_on_rank(run, folder, compute_metrics=measured)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_trainer_is_one_processs(run, ranks_of, tmp_path):
    exact, nudged = of_one_process(run)
    norms = exact.logged["grad_norm"]
    assert not run.clip or min(norms) < 0.97 * run.clip < 1.03 * run.clip < max(norms), norms
    assert_as_alone(ranks_of(run.ranks).run(on_rank, run, tmp_path), exact, nudged)


@pytest.mark.timeout(3600)
def test_all_trainers_are_one_processs(request, ranks_of, tmp_path):
    for run in MORE_RUNS if request.config.getoption("--full") else [replace(STREAM, steps=6)]:
        assert_as_alone(ranks_of(run.ranks).run(on_rank, run, tmp_path), *of_one_process(run))


@pytest.mark.timeout(1200)
def test_fsdp_deepspeed_and_compilation_change_nothing(request, ranks_of, tmp_path):
    runs = [*SPREAD, *ZERO] if request.config.getoption("--full") else [replace(SPREAD[0], steps=6)]
    for run in runs:
        assert_as_alone(ranks_of(run.ranks).run(on_rank, run, tmp_path), *of_one_process(run, options=()))


@pytest.mark.timeout(1200)
def test_fine_tuning_is_one_processs(request, ranks_of, tmp_path):
    for run in MORE_FINE_TUNED if request.config.getoption("--full") else FINE_TUNED:
        one = replace(run, data=1, context=1)
        exact, nudged = (fine_tune(one, tmp_path, nudged) for nudged in (False, True))
        assert "mean_token_accuracy" in exact.logged and "eval_num_tokens" in exact.summary
        assert_as_alone(ranks_of(run.ranks).run(fine_tune_on_rank, run, tmp_path), exact, nudged)


def resumed_on_rank(run, folder):
    """Runs as a rank: a run that ends in the middle of an epoch, and a new trainer that goes on from there."""
    from distflash.integrations import transformers as dft

    saving = replace(run, options=(*run.options, ("save_strategy", "steps"), ("save_steps", 4)))
    with process_of_ranks(), registered(run) as cp:
        make_trainer(dft.Trainer, replace(saving, steps=4), "distflash", folder, context_parallel=cp).train()
        torch.manual_seed(1 + cp.rank)  # another state than that in which the first one ended
        second = make_trainer(dft.Trainer, saving, "distflash", folder, context_parallel=cp)
        return finish(second, resume_from_checkpoint=True)


@pytest.mark.timeout(600)
def test_a_run_that_is_resumed_in_an_epoch_is_the_same(ranks_of, tmp_path):
    run = Run(steps=9, optimizer="adamw_torch", options=(("lr_scheduler_type", "constant"),))
    exact, nudged = of_one_process(run)
    for outcome in ranks_of(2).run(resumed_on_rank, run, tmp_path):
        for name in ("loss", "grad_norm", "epoch", "num_input_tokens_seen"):
            limit = 4 * max(1e-7, relative(nudged.logged[name], exact.logged[name]))
            assert relative(outcome.logged[name], exact.logged[name]) <= limit, name
        assert worst(outcome.weights, exact.weights) <= 4 * worst(nudged.weights, exact.weights)


@pytest.mark.timeout(600)
def test_bfloat16_is_as_exact_as_one_processs(ranks_of, tmp_path):
    run = Run(steps=6, options=(("bf16", True),))
    truth, own = alone(replace(run, context=1, options=())), alone(replace(run, context=1))
    for outcome in ranks_of(2).run(on_rank, run, tmp_path):
        for name in ("loss", "grad_norm"):
            bar = relative(own.logged[name], truth.logged[name])
            assert bar > 1e-5 and relative(outcome.logged[name], truth.logged[name]) <= 3 * bar, name


@pytest.mark.timeout(600)
def test_adapters_of_a_frozen_base_in_bfloat16_are_as_exact_as_one_processs(request, ranks_of, tmp_path):
    run = Run(steps=6, lora=True, kept=True)
    truth, own = alone(replace(run, context=1, kept=False, rounded=True)), alone(replace(run, context=1))
    runs = [replace(run, fsdp=True, options=CHECKPOINTED)]
    runs += [replace(run, options=CHECKPOINTED)] if request.config.getoption("--full") else []
    for each in runs:
        for outcome in ranks_of(2).run(on_rank, each, tmp_path):
            dtypes = {p.dtype for name, p in outcome.weights.items() if "lora" not in name}
            assert dtypes == {torch.bfloat16} and len(outcome.weights) == len(own.weights)
            for name in ("loss", "grad_norm"):
                bar = relative(own.logged[name], truth.logged[name])
                assert bar > 1e-5 and relative(outcome.logged[name], truth.logged[name]) <= 3 * bar, name


@pytest.mark.timeout(600)
def test_a_loop_of_accelerate_is_one_processs(request, ranks_of):
    runs = [Run(steps=6, clip=CLIP), Run(steps=6, data=2, batch=4)]
    for run in runs if request.config.getoption("--full") else runs[:1]:
        exact = accelerate_loop(run, False)
        assert len(set(exact.rates)) > 2
        for found in ranks_of(run.ranks).run(accelerate_loop, run, True):
            for name in ("losses", "norms", "rates"):
                assert relative(getattr(found, name), getattr(exact, name)) <= 1e-6, name
            assert worst(found.weights, exact.weights) <= 1e-6


def with_seeds_of_their_own(run, folder):
    """Runs as a rank: the text of the error."""
    from distflash.integrations import transformers as dft

    with process_of_ranks(), registered(run) as cp:
        run = replace(run, options=(("seed", 3 + cp.rank),))
        with pytest.raises(ValueError, match="disagree") as error:
            make_trainer(dft.Trainer, run, "distflash", folder, context_parallel=cp)
        return str(error.value)


def without_attention_over_ranks(run, folder):
    """Runs as a rank: a model that attends by itself, with the batch of a trainer."""
    from distflash.integrations import transformers as dft

    with process_of_ranks(), registered(run) as cp:
        trainer = make_trainer(dft.Trainer, run, "eager", folder, context_parallel=cp)
        with pytest.raises(ValueError, match="attn_implementation") as error:
            trainer.train()
        return str(error.value)


def without_a_launcher(run, folder):
    """Runs as a rank: a process group that accelerate is told nothing of."""
    from distflash.integrations import transformers as dft

    with process_of_ranks(), registered(run) as cp:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
        with pytest.raises(ValueError, match="start the script with torchrun") as error:
            make_trainer(dft.Trainer, run, "distflash", folder, context_parallel=cp)
        return str(error.value)


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (with_seeds_of_their_own, "seed is 3"),
        (without_attention_over_ranks, "no layer"),
        (without_a_launcher, "there are 2 ranks, but the library counts 1"),
    ],
)
def test_a_mistake_stops_all_ranks(mistake, text, ranks_of, tmp_path):
    assert all(text in told for told in ranks_of(2).run(mistake, Run(steps=1), tmp_path))
