"""The uptraining job: reduce a checkpoint to fewer key heads, and continue training for a fraction of its steps.

The converted checkpoint is step 0 of an ordinary training run, which resumes from it.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distflash.recipes.checkpoint import checkpoints_of, step_of
from distflash.recipes.config import ModelConfig, require
from distflash.recipes.data import Corpus
from distflash.recipes.grouping import open_source, write_grouped
from distflash.recipes.held_out import HeldOut, open_on_all, plot_curves, read_curve
from distflash.recipes.together import gather, on_lead, together
from distflash.recipes.trainer import check_out, no_watch, prepare_out, run, train
from distflash.recipes.uptrain_config import Method, UptrainConfig

# The runs of `--compare`: the unchanged source, then each method.
COMPARED: dict[str, Method | None] = {
    "original, trained on": None,
    "mean of the group": "mean",
    "first head of the group": "first",
    "random heads": "random",
}


@dataclass(frozen=True)
class Source:
    """The checkpoint to uptrain, its number of steps, and its model."""

    path: Path
    steps: int
    shape: ModelConfig


def main(config: UptrainConfig) -> int:
    """Run the job and return the exit code: 0 done or stopped by a signal, else that of a `JobError`."""
    # A comparison has runs in folders of --out, each of which is checked separately.
    whole = replace(config, resume=False) if config.compare else config
    return run(whole, lambda corpus, device: uptrain(config, corpus, device))


def uptrain(config: UptrainConfig, corpus: Corpus, device: torch.device) -> int:
    """All ranks call. Everything is checked before anything is written."""
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
    """The options of one run of a comparison. Raises a ValueError if its folder exists and --resume is not given."""
    single = replace(config, compare=False, resume=False, out=config.out / (method or "original"))
    resume = config.resume and bool(checkpoints_of(single).complete())
    check_out(single := replace(single, resume=resume))
    return single


def configured(config: UptrainConfig, source: Source) -> UptrainConfig:
    """The options completed from the source. Raises a ValueError for options that do not fit it."""
    require(
        config.out.resolve() not in source.path.resolve().parents,
        "--out",
        config.out,
        f"another folder than that of --source, where {source.path} would be lost",
    )
    shape = source.shape
    kv_heads = shape.kv_heads // 2 if config.kv_heads is None else config.kv_heads
    require(
        1 <= kv_heads < shape.kv_heads and shape.heads % kv_heads == 0,
        "--kv-heads",
        kv_heads,
        f"a divisor of the source's {shape.heads} query heads, and less than its {shape.kv_heads} key heads",
    )
    made = max(1, round(config.share * source.steps))
    memory = {
        "checkpoint_activations": config.checkpoint_activations,
        "recompute_attention": config.recompute_attention,
    }
    return with_heads(replace(config, kv_heads=kv_heads, model=replace(shape, **memory), steps=made), kv_heads)


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
    """Convert (unless the run resumes) and train. method: None if heads stay unchanged."""
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
    """On rank 0: write all curves to one file, and plot them."""
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
