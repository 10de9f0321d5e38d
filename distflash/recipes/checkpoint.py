"""Atomic checkpoints with a digest of each file.

A checkpoint is written to a hidden folder, which is renamed when it is complete and its digests are written. So an
interrupted write leaves the previous checkpoint untouched. A run resumes from the newest checkpoint whose files match
their digests, and renames newer ones that are damaged.
"""

import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distflash.recipes import manifest
from distflash.recipes.config import ModelConfig, TrainConfig
from distflash.recipes.together import Refused, gather, on_lead, together

STEP = re.compile(r"step-\d{8,}")
# Options of the model that affect its memory, not its result.
MEMORY_ONLY = ("checkpoint_activations", "recompute_attention")


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a job reads, and newer ones that are damaged, each with the reason.

    writer: the program that wrote it. stored: the options of its model, see `read_shape`.
    """

    source: Path
    writer: str
    stored: dict[str, Any]
    damaged: tuple[tuple[Path, str], ...] = ()

    @property
    def step(self) -> int:
        return step_of(self.source)

    def set_aside(self) -> list[str]:
        """Rename damaged checkpoints, so that later runs ignore them. Returns a message for each."""
        lines = []
        for path, reason in self.damaged:
            aside = path.rename(free_name(path.with_name(f"damaged-{path.name}")))
            lines.append(f"{reason}; it is now {aside.name}, and the run resumes from {self.source.name}")
        return lines


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    keep: int

    def complete(self) -> list[Path]:
        """All complete checkpoints, the newest first. Other folders are ignored."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        named = (path for path in found if STEP.fullmatch(path.name) and path.is_dir())
        return sorted(named, key=step_of, reverse=True)

    @contextmanager
    def writing(self, step: int, shape: ModelConfig, writer: str, seq_len: int | None = None) -> Iterator[Path]:
        """A folder to write a checkpoint to. It is renamed to `step-*` when all ranks have left. All ranks call.

        seq_len: the training length, for evaluation beyond it.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".writing-{final.name}"

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)  # left over from an interrupted write
            partial.mkdir(parents=True)
            (partial / "model.json").write_text(json.dumps(asdict(shape) | {"seq_len": seq_len}))

        on_lead(begin)
        yield partial
        gather(None)  # all have written
        manifest.seal(partial, writer, step)
        on_lead(lambda: self.publish(partial, final))

    def publish(self, partial: Path, final: Path) -> None:
        """Give a complete checkpoint its name."""
        if final.exists():  # of a run that was stopped at a step it had just saved
            discard(final)
        partial.rename(final)

    def prune(self) -> None:
        """Delete all but the newest `keep`. Call it after a later step was finite, so that the newest is known good."""
        for old in self.complete()[self.keep :]:
            discard(old)

    def choose(self, shape: ModelConfig, writer: str) -> Choice:
        """The newest undamaged checkpoint. All ranks call. Nothing is changed on disk.

        Raises:
            Refused: on every rank, if there is none, or if it is of another model or another program.
        """
        choice, damaged = newest_whole(gather(self.complete())[0])
        if choice is None:
            remedy = "restore a checkpoint there, or start anew with --overwrite or another --out"
            reasons = damaged or [f"{self.folder} holds no checkpoint"]
            raise Refused({f"--resume: {reason}; {remedy}": 0 for reason in reasons})
        if choice.writer != writer:
            raise Refused(
                f"--resume: {choice.source} was written by {choice.writer}; resume with it, or name another --out"
            )
        together(lambda: check_shape(choice.source, choice.stored, shape))
        return choice


def newest_whole(paths: Sequence[Path]) -> tuple[Choice | None, list[str]]:
    """The first undamaged checkpoint, or None, and what is wrong with those before it. All ranks call."""
    damaged: list[tuple[Path, str]] = []
    for path in paths:
        try:
            found = manifest.check(path)
            stored = together(lambda path=path: read_shape(path))[0]  # type: ignore[misc]
        except Refused as refusal:
            damaged.append((path, str(refusal)))
            continue
        return Choice(path, found.writer, stored, tuple(damaged)), [reason for _, reason in damaged]
    return None, [reason for _, reason in damaged]


def find_trained(folder: Path, writer: str) -> Choice:
    """The newest undamaged checkpoint of a run's folder, or `folder` itself if it is one. All ranks call.

    Raises:
        Refused: on every rank, if there is none, or if another program wrote it.
    """
    paths = [folder] if STEP.fullmatch(folder.name) else Checkpoints(folder / "checkpoints", keep=1).complete()
    choice, damaged = newest_whole(gather(paths)[0])
    if choice is None:
        reasons = damaged or [f"{folder} holds no checkpoint; name the --out of a run of {writer}"]
        raise Refused({f"--checkpoint: {reason}": 0 for reason in reasons})
    if choice.writer != writer:
        raise Refused(f"--checkpoint: {choice.source} was written by {choice.writer}; expected one of {writer}")
    return choice


def checkpoints_of(config: TrainConfig) -> Checkpoints:
    return Checkpoints(config.out / "checkpoints", config.keep_checkpoints)


def free_name(path: Path) -> Path:
    """The first of `path`, `path-2`, `path-3`, ... that does not exist."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())


def discard(checkpoint: Path) -> None:
    gone = checkpoint.rename(checkpoint.with_name(f".discarded-{checkpoint.name}"))  # no step-* is ever incomplete
    shutil.rmtree(gone)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_shape(source: Path) -> dict[str, Any]:
    """The options of the model of `source`. Raises a ValueError if its file is damaged."""
    path = source / "model.json"
    stored = manifest.read_json(path)
    names = set(asdict(ModelConfig())) - set(MEMORY_ONLY)
    if not isinstance(stored, dict) or not names <= stored.keys():
        raise ValueError(f"{path} is damaged: it does not describe a model")
    return stored


def model_of(choice: Choice) -> ModelConfig:
    """The model of a checkpoint. Raises a ValueError if its options are invalid."""
    names = asdict(ModelConfig()).keys() - set(MEMORY_ONLY)
    try:
        return ModelConfig(**{name: choice.stored[name] for name in names})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{choice.source / 'model.json'} is damaged: it does not describe a model ({error})"
        ) from error


def trained_length(choice: Choice) -> int | None:
    """The sequence length in training; None if the checkpoint does not have it."""
    length = choice.stored.get("seq_len")
    return length if type(length) is int and length > 0 else None


def check_shape(source: Path, stored: dict[str, Any], shape: ModelConfig) -> None:
    """Raise a ValueError if the model of `source` differs from this run's, with the first option that differs."""
    for name, value in asdict(shape).items():
        if name not in MEMORY_ONLY and stored[name] != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: got {value}, but {source} was trained with {stored[name]}; "
                "resume with the same model, or start anew with another --out"
            )
