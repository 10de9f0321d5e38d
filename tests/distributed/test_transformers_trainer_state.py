"""Files of a trainer over ranks equal those of one process: logs, checkpoints, the best model."""

import contextlib
import io
import os
import re
import signal
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.trainer_runs import (
    Run,
    finish,
    make_trainer,
    process_of_ranks,
    registered,
    relative,
    train,
    worst,
)

PRELOAD = "distflash.integrations.transformers.sft"
# What is compared of each step.
NAMES = ("loss", "grad_norm", "epoch", "num_input_tokens_seen", "learning_rate")
RUN = Run(steps=9, optimizer="adamw_torch", options=(("lr_scheduler_type", "constant"),))


def load():
    """Runs as a rank; see test_transformers_trainer.py."""
    from distflash.integrations.transformers import Trainer

    return Trainer.__name__


def loaded(ranks):
    assert ranks.run(load) == ["Trainer"] * ranks.count
    return ranks


def one_process(run, folder):
    run = replace(run, data=1, context=1, fsdp=False)
    return [train(run, folder / f"alone-{nudged}", nudged) for nudged in (False, True)]


def with_checkpoints(run):
    return replace(run, options=(*run.options, ("save_strategy", "steps"), ("save_steps", 4)))


def on_rank(run, folder, **others):
    """Runs as a rank: a trainer."""
    from distflash.integrations import transformers as dft

    return make_trainer(dft.Trainer, run, "distflash", folder, **others)


class Killed(TrainerCallback):
    """Ends the process, as a machine does that goes away, in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def until_it_is_killed(run, folder):
    """Runs as a rank."""
    with process_of_ranks(), registered(run) as cp:
        on_rank(with_checkpoints(run), folder, context_parallel=cp, callbacks=[Killed(6)]).train()


def until_a_checkpoint(run, folder):
    """Runs as a rank."""
    with process_of_ranks(), registered(run) as cp:
        on_rank(replace(with_checkpoints(run), steps=4), folder, context_parallel=cp).train()


def resumed(run, folder):
    """Runs as a rank: a new trainer that goes on from the last checkpoint."""
    with process_of_ranks(), registered(run) as cp:
        torch.manual_seed(1 + cp.rank)  # another state than that in which the first one ended
        return finish(on_rank(with_checkpoints(run), folder, context_parallel=cp), resume_from_checkpoint=True)


def assert_goes_on_as(exact, nudged, outcomes):
    for outcome in outcomes:
        for name in NAMES:
            limit = 4 * max(1e-7, relative(nudged.logged[name], exact.logged[name]))
            assert relative(outcome.logged[name], exact.logged[name]) <= limit, name
        assert worst(outcome.weights, exact.weights) <= 4 * worst(nudged.weights, exact.weights)


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_goes_on_with_the_same_losses(ranks_of, tmp_path):
    ranks = loaded(ranks_of(2))
    replies = ranks.replies(until_it_is_killed, RUN, tmp_path / "run")
    assert not any(reply.ok for reply in replies.values())
    assert any("died with exit code -9" in reply.value for reply in replies.values())
    assert [each.name for each in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    assert_goes_on_as(*one_process(RUN, tmp_path), loaded(ranks).run(resumed, RUN, tmp_path / "run"))


# Before and after the checkpoint.
ELSEWHERE = [(RUN, replace(RUN, context=3))]
MORE = [
    (replace(RUN, data=2, batch=4), replace(RUN, data=2, batch=4)),
    (replace(RUN, stream=True), replace(RUN, stream=True)),
    (replace(RUN, data=2, batch=4, stream=True), replace(RUN, data=2, batch=4, stream=True)),
    (replace(RUN, batch=4), replace(RUN, data=2, batch=4)),
    (replace(RUN, data=2, batch=4), replace(RUN, context=2, batch=4)),
    (replace(RUN, context=3), replace(RUN, context=1)),
]


@pytest.mark.timeout(1200)
def test_other_ranks_go_on_from_a_checkpoint(request, ranks_of, tmp_path):
    for n, (before, after) in enumerate([*ELSEWHERE, *MORE] if request.config.getoption("--full") else ELSEWHERE):
        folder = tmp_path / str(n)
        loaded(ranks_of(before.ranks)).run(until_a_checkpoint, before, folder)
        assert_goes_on_as(*one_process(after, tmp_path), loaded(ranks_of(after.ranks)).run(resumed, after, folder))


# What is looked at while it trains

# By its loss, the greater the better: the first evaluation is the best, so that another model is loaded at the end.
WATCHED = Run(
    steps=6,
    options=(
        ("eval_strategy", "steps"),
        ("eval_steps", 2),
        ("save_strategy", "steps"),
        ("save_steps", 2),
        ("load_best_model_at_end", True),
        ("metric_for_best_model", "eval_loss"),
        ("greater_is_better", True),
        ("disable_tqdm", False),
        ("report_to", "tensorboard"),
    ),
)


class Events(TrainerCallback):
    """Notes what a trainer calls its callbacks with."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args, state, control, **_):
            switches = {key: x for key, x in vars(control).items() if key.startswith("should_")}
            self.seen.append((name, state.global_step, state.max_steps, round(state.epoch or 0, 6), *switches.items()))

        return note


def watched(kind, attention, folder, **others):
    """What a user sees of a run, and what it leaves behind."""
    events, screen = Events(), io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        trainer = make_trainer(kind, WATCHED, attention, folder, callbacks=[events], **others)
        trainer.train()
        trainer.save_model(str(folder / "final"))
    return {
        "events": events.seen,
        "history": trainer.state.log_history,
        "best": (trainer.state.best_global_step, trainer.state.best_metric),
        "screen": screen.getvalue(),
        "weights": {
            name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        },
    }


def watched_on_rank(folder):
    """Runs as a rank."""
    from distflash.integrations import transformers as dft

    with process_of_ranks(), registered(WATCHED) as cp:
        return watched(dft.Trainer, "distflash", folder, context_parallel=cp)


def scalars(folder):
    """The numbers in TensorBoard's files, by name and step: records of a length, data and two checksums."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in Path(folder).rglob("events.out.tfevents.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found |= {(x.tag, event.step): x.simple_value for x in event.summary.value if x.HasField("simple_value")}
    return found


def printed(screen):
    """The numbers that the progress bar leaves on the screen, and how far it got."""
    logs = [dict(re.findall(r"'(\w+)': '?([-\d.e]+)", line)) for line in re.findall(r"\{.*\}", screen)]
    return logs, re.findall(r"\d+/\d+", screen)[-1]


CLOCK = ("second", "runtime", "time")


def assert_same_numbers(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name in got:
        if not any(part in str(name) for part in CLOCK):
            assert abs(float(got[name]) - float(expected[name])) <= tolerance * abs(float(expected[name])), name


@pytest.mark.timeout(600)
def test_what_a_user_sees_and_keeps_is_one_processs(ranks_of, tmp_path):
    from safetensors.torch import load_file
    from transformers import Trainer

    with process_of_ranks():
        alone = watched(Trainer, "eager", tmp_path / "alone")
    over = loaded(ranks_of(2)).run(watched_on_rank, tmp_path / "over")
    assert alone["best"][0] < WATCHED.steps and len(alone["history"]) == WATCHED.steps + 4
    for rank, found in enumerate(over):
        assert found["events"] == alone["events"]
        for got, expected in zip(found["history"], alone["history"], strict=True):
            assert_same_numbers(got, expected, 2e-4)
        assert found["best"][0] == alone["best"][0]
        assert worst(found["weights"], alone["weights"]) <= 1e-4
        assert ("loss" in found["screen"]) == (rank == 0)
    (logs, bar), (expected_logs, expected_bar) = printed(over[0]["screen"]), printed(alone["screen"])
    assert bar == expected_bar and len(logs) == len(expected_logs) > WATCHED.steps
    for got, expected in zip(logs, expected_logs, strict=True):
        assert_same_numbers(got, expected, 2e-3)  # of four digits
    events = scalars(tmp_path / "over")
    assert len(events) > 5 * WATCHED.steps
    assert_same_numbers(events, scalars(tmp_path / "alone"), 2e-4)
    files = sorted(each.relative_to(tmp_path / "alone") for each in (tmp_path / "alone").rglob("*.safetensors"))
    assert len(files) >= 3
    for file in files:  # the best model, and those of the checkpoints that are left
        assert worst(load_file(tmp_path / "over" / file), load_file(tmp_path / "alone" / file)) <= 1e-4, file


class Hub:
    """Takes what would be uploaded."""

    def __init__(self):
        self.uploads = []

    def upload_folder(self, **given):
        self.uploads.append(sorted(os.listdir(given["folder_path"])))

    def create_repo(self, name, **_):
        return type("Url", (), {"repo_id": name})()


def pushed(folder):
    """Runs as a rank: what it would upload."""
    import transformers.trainer as library

    run, hub = Run(steps=1), Hub()
    before = library.hf_api
    library.hf_api = lambda: hub
    try:
        with process_of_ranks(), registered(run) as cp:
            trainer = on_rank(run, folder, context_parallel=cp)
            trainer.hub_model_id = trainer.args.hub_model_id = "somebody/model"
            trainer.train()
            trainer.push_to_hub(blocking=True)
    finally:
        library.hf_api = before
    return hub.uploads


def test_one_rank_pushes_a_model(ranks_of, tmp_path):
    first, second = loaded(ranks_of(2)).run(pushed, tmp_path)
    assert len(first) == 1 and "model.safetensors" in first[0] and second == []
