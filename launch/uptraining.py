"""Uptraining: a checkpoint of the main job with fewer key heads, trained on for a share of its steps.

The converted checkpoint is step 0 of a run of the main job, which then resumes from it. So it goes on as any other,
after an interruption too, and what it writes is read by all that reads checkpoints of the main job.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tyro.conf import Suppress

from launch.checkpoint import checkpoints_of, step_of
from launch.config import ModelConfig, TrainConfig, positive, require
from launch.data import Corpus
from launch.grouping import Method, open_source, write_grouped
from launch.held_out import HeldOut, open_on_all, plot_curves, read_curve
from launch.options import parse
from launch.together import gather, on_lead, together
from launch.trainer import check_out, no_watch, prepare_out, run, train

# What `--compare` trains: without a change, then by each method.
COMPARED: dict[str, Method | None] = {
    "original, trained on": None,
    "mean of the group": "mean",
    "first head of the group": "first",
    "random heads": "random",
}


@dataclass(frozen=True)
class UptrainConfig(TrainConfig):
    """Give a checkpoint of launch/train.py fewer key heads, and train it on for a share of its steps."""

    source: Path = field(kw_only=True)
    """The --out of a run of launch/train.py, of which the newest checkpoint is taken, or one of its step-* folders."""
    kv_heads: int = field(kw_only=True)
    """Key and value heads afterwards: a divisor of the query heads, and fewer than the source has."""
    method: Method = "mean"
    """What a new key head is: the mean of those of its group of query heads, the first of them, or drawn anew."""
    share: float = 0.1
    """Steps to train on for, as a share of those that the source has made. The learning rate warms up and falls again
    over them, and moments and step counts of keys and values begin anew."""
    compare: bool = False
    """Uptrain by all three methods, and the source as it is, each in a folder of --out; the held-out losses against
    steps are in compare.json and compare.png. With --resume it goes on where it was stopped."""
    held_out: Path | None = None
    """Text that the source was not trained on, as --data: its loss is measured on the way, and kept in held_out.json.
    Left out: with --compare the tests of the running Python's standard library, which the default of --data has not."""
    held_out_batches: int = 8
    """Batches of held-out text that are read each time."""
    held_out_points: int = 10
    """How often it is measured on the way, beside at once."""
    seed: int = 1
    """Seed of the order of the data, and of heads that are drawn. Give another one than the source had: with its own,
    the text of its first steps comes once more."""
    out: Path = Path("runs/uptrain")
    """Folder of the run: metrics.jsonl, loss.png and checkpoints, the first of them at once."""
    checkpoint_activations: bool = False
    """As in launch/train.py: keep only the input of each block and the result of its attention."""
    recompute_attention: bool = False
    """Beside --checkpoint-activations: recompute attention too."""

    # Known from the source.
    model: Suppress[ModelConfig] = field(default_factory=ModelConfig)
    steps: Suppress[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("--share", self.share)
        for name in ("held_out_batches", "held_out_points"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")
        require(
            not (self.compare and self.data is not None and self.held_out is None),
            "--compare",
            "--data without --held-out beside it",
            "text for --held-out that --data does not have",
        )


@dataclass(frozen=True)
class Source:
    """What is uptrained: a checkpoint, the steps that it has made, and its model."""

    path: Path
    steps: int
    shape: ModelConfig


def main(arguments: list[str] | None = None) -> int:
    """Run the job and return the exit code: 0 done or stopped by a signal, else that of `launch.together`."""
    config = parse(UptrainConfig, arguments)
    # A comparison has its checkpoints in folders of --out, each of which is looked at by itself.
    whole = replace(config, resume=False) if config.compare else config
    return run(whole, lambda corpus, device: uptrain(config, corpus, device))


def uptrain(config: UptrainConfig, corpus: Corpus, device: torch.device) -> int:
    """All ranks call. Nothing is written before all that can be refused is known."""
    source = Source(*open_source(config.source))
    config = together(lambda: configured(config, source))[0]
    held_out = open_on_all(config.held_out, config.seq_len) if config.compare or config.held_out else None
    if not config.compare:
        one(config, source, config.method, corpus, held_out, device)
        return 0
    runs = together(lambda: {label: single_run(config, method) for label, method in COMPARED.items()})[0]
    for label, method in COMPARED.items():
        each = runs[label] if method else with_heads(runs[label], source.shape.kv_heads)
        one(each, source, method, corpus, held_out, device)
        if gather(step_of(checkpoints_of(each).complete()[0]))[0] < each.steps:  # stopped by a signal
            return 0
    on_lead(lambda: show(config, source, {label: each.out for label, each in runs.items()}))
    return 0


def single_run(config: UptrainConfig, method: Method | None) -> UptrainConfig:
    """One run of a comparison; a ValueError where its folder is in the way. It resumes only what has begun."""
    single = replace(config, compare=False, resume=False, out=config.out / (method or "original"))
    resume = config.resume and bool(checkpoints_of(single).complete())
    check_out(single := replace(single, resume=resume))
    return single


def configured(config: UptrainConfig, source: Source) -> UptrainConfig:
    """With the model and the steps that follow from the source; a ValueError for what does not fit it."""
    require(
        config.out.resolve() not in source.path.resolve().parents,
        "--out",
        config.out,
        f"another folder than that of --source, where {source.path} would be lost",
    )
    shape = source.shape
    require(
        1 <= config.kv_heads < shape.kv_heads and shape.heads % config.kv_heads == 0,
        "--kv-heads",
        config.kv_heads,
        f"a divisor of the source's {shape.heads} query heads, and less than its {shape.kv_heads} key heads",
    )
    made = max(1, round(config.share * source.steps))
    memory = {
        "checkpoint_activations": config.checkpoint_activations,
        "recompute_attention": config.recompute_attention,
    }
    return with_heads(replace(config, model=replace(shape, **memory), steps=made), config.kv_heads)


def with_heads(config: UptrainConfig, kv_heads: int) -> UptrainConfig:
    return replace(config, model=replace(config.model, kv_heads=kv_heads))


def one(
    config: UptrainConfig,
    source: Source,
    method: Method | None,
    corpus: Corpus,
    held_out: Corpus | None,
    device: torch.device,
) -> None:
    """Convert, unless the run is one that resumes, and train. method: None where no head is changed."""
    path = config.out / "held_out.json"
    if not config.resume:
        on_lead(lambda: prepare_out(config, None))
        on_lead(lambda: path.unlink(missing_ok=True))
        write_grouped(config, source.path, source.shape, method or "mean", device)
    watch = no_watch
    if held_out is not None:
        every = max(1, config.steps // config.held_out_points)
        watch = HeldOut(held_out, path, every, config.steps, config.held_out_batches).watch
    train(replace(config, resume=True, overwrite=False), corpus, device, watch)


def show(config: UptrainConfig, source: Source, folders: dict[str, Path]) -> None:
    """On the first rank: keep all curves in one file, and draw them."""
    curves = {label: read_curve(folder / "held_out.json") for label, folder in folders.items()}
    before = next(iter(curves.values()))[0]
    kept = {
        "source": str(source.path),
        "source_steps": source.steps,
        "kv_heads": {"source": source.shape.kv_heads, "uptrained": config.kv_heads},
        "held_out_loss_of_source": before,
        "held_out_loss_by_step": curves,
    }
    (config.out / "compare.json").write_text(json.dumps(kept, indent=1))
    heads = f"{source.shape.kv_heads} key heads to {config.kv_heads} for {source.shape.heads} query heads"
    picture = config.out / "compare.png"
    plot_curves(picture, curves, before, source.steps, f"Uptraining from {heads}")
    for label, curve in curves.items():
        print(f"{label}: held-out loss {curve[0]:.4f} at once, {curve[max(curve)]:.4f} after {max(curve)} steps")
    print(f"comparison: {picture}")
    sys.stdout.flush()
