"""The evaluation job, in the order of execution: model, held-out text, losses by context length, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

import distflash as df
from distflash.recipes.by_context import ByContext, edges_of, plot, table, with_error
from distflash.recipes.checkpoint import trained_length
from distflash.recipes.data import Corpus, open_held_out
from distflash.recipes.inference_config import EvaluateConfig
from distflash.recipes.together import Refused, is_lead, on_lead, together
from distflash.recipes.trained import Trained, load_trained
from distflash.recipes.trainer import check_folder, check_same, on_ranks


@dataclass(frozen=True)
class Job:
    """What is measured. seq_len: tokens per sequence. trained: the same in training, if known."""

    config: EvaluateConfig
    corpus: Corpus
    seq_len: int
    trained: int | None
    out: Path


def main(config: EvaluateConfig) -> int:
    """Run the job and return its exit code."""
    return on_ranks(config, lambda device: evaluate(config, device))


def evaluate(config: EvaluateConfig, device: torch.device) -> int:
    trained = load_trained(config, device)
    job = agree(config, trained)
    measured = measure(job, trained)
    on_lead(lambda: tell(job, trained, measured))
    return 0


def agree(config: EvaluateConfig, trained: Trained) -> Job:
    """Open the text and check the output folder. Raises Refused on all ranks if any fails or has another text."""
    source, told = trained.choice.source, trained_length(trained.choice)
    if None not in (told, config.trained_seq_len) and told != config.trained_seq_len:
        raise Refused(
            f"--trained-seq-len: got {config.trained_seq_len}, but {source} was trained with {told}; leave it out, and "
            "pass --seq-len for other lengths"
        )
    seq_len = config.seq_len or (None if told is None else 2 * told)
    if seq_len is None:
        raise Refused(f"--seq-len: {source} does not say with what length it was trained; give --seq-len")
    length = told or config.trained_seq_len
    out = config.out or trained.choice.source.parent.parent

    def look() -> tuple[Corpus, str]:
        check_folder(out)
        corpus = open_held_out(config.held_out, seq_len)
        return corpus, corpus.fingerprint()

    found = together(look)
    check_same([fingerprint for _, fingerprint in found], "--held-out")
    return Job(config, found[dist.get_rank()][0], seq_len, length, out)


def measure(job: Job, trained: Trained) -> ByContext:
    """The losses of all sequences, summed over all ranks. All ranks call."""
    edges, count = edges_of(job.seq_len, job.trained), job.config.sequences
    sums = torch.zeros(count, len(edges) - 1, dtype=torch.float64)
    caches = trained.caches(job.seq_len)
    quiet = not (is_lead() and sys.stderr.isatty())
    with trained.inference():
        for n in track(range(count), "sequences", console=Console(stderr=True), disable=quiet):
            window = torch.from_numpy(job.corpus.read(offset_of(n, job), job.seq_len + 1)).long()
            for context, losses in losses_of(window, job.config.chunk, trained, caches):
                bins = torch.searchsorted(edges, context, right=True) - 1
                sums[n].index_add_(0, bins, losses.double().cpu())
    total = sums.to(trained.device)
    dist.all_reduce(total)
    return ByContext(edges, total.cpu())


def offset_of(n: int, job: Job) -> int:
    """The start of sequence `n`. Sequences are evenly spaced, and overlap only if there is too little text."""
    return n * (job.corpus.size - job.seq_len - 1) // max(1, job.config.sequences - 1)


def losses_of(window: Tensor, chunk: int, trained: Trained, caches: list[df.Cache]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each chunk, this rank's predictions: context lengths, int64 [T], and losses in nats, float32 [T].

    window: int64 [S + 1], the same on every rank. Every byte except the first is predicted.
    """
    for cache in caches:
        cache.truncate(0)
    for start in range(0, len(window) - 1, chunk):
        part = window[start : start + chunk + 1]
        tokens = len(part) - 1
        local = trained.cp.positions(tokens, "cpu")
        logits = trained.model.prefill(part[local][None].to(trained.device), tokens, caches)
        labels = part[local + 1].to(trained.device)
        yield start + local + 1, F.cross_entropy(logits[0].float(), labels, reduction="none")


def tell(job: Job, trained: Trained, measured: ByContext) -> None:
    """Print, write and plot the results, on rank 0."""
    choice, length = trained.choice, job.trained
    known = "" if length is None else f", trained with {length:,} bytes a sequence"
    print(f"checkpoint: {choice.source}{known}")
    print(
        f"held-out text: {len(job.corpus.files)} documents, {job.corpus.size / 1e6:.1f} MB, of which "
        f"{job.config.sequences} sequences of {job.seq_len:,} bytes"
    )
    print(f"bits per byte: {with_error(measured.whole)}")
    print("\n".join(table(measured.coarse(length))))
    job.out.mkdir(parents=True, exist_ok=True)
    results, picture = job.out / "evaluation.json", job.out / "evaluation.png"
    results.write_text(json.dumps(record(job, trained, measured), indent=1) + "\n")
    plot(measured, length, f"{job.config.sequences} held-out sequences, {choice.source.name}", picture)
    print(f"results: {results}, {picture}", flush=True)


def record(job: Job, trained: Trained, measured: ByContext) -> dict[str, Any]:
    """The content of evaluation.json. Bits are per byte; `by_context` has a bin per range of context lengths."""
    config, length = job.config, job.trained
    beyond = None if length is None or length >= job.seq_len else measured.mean(length + 1, job.seq_len + 1)
    within = None if length is None else measured.mean(1, min(length, job.seq_len) + 1)
    return {
        "checkpoint": str(trained.choice.source),
        "step": trained.choice.step,
        "held_out_bytes": job.corpus.size,
        "sequences": config.sequences,
        "seq_len": job.seq_len,
        "trained_seq_len": length,
        "ranks": trained.cp.world_size,
        "layout": config.layout,
        "chunk": config.chunk,
        "dtype": str(trained.dtype).removeprefix("torch."),
        "bits_per_byte": measured.whole.bits,
        "standard_error": measured.whole.error,
        "bits_per_byte_within_training_length": within and within.bits,
        "bits_per_byte_beyond_training_length": beyond and beyond.bits,
        "by_context": [asdict(mean) for mean in measured.fine()],
    }
