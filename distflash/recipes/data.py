"""Text as bytes, and which bytes make the batch of a step. A batch depends on seed and step, not on the ranks."""

import hashlib
import os
import sysconfig
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SEPARATOR = 0  # a byte that no text holds: one follows every document


@dataclass(frozen=True)
class Corpus:
    """Documents one after the other, each followed by a separator. Only the bytes of a window are ever read.

    files: the documents. ends [len(files)]: the offset behind each one's separator.
    """

    files: tuple[Path, ...]
    ends: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all documents and separators."""
        return self.ends[-1]

    def fingerprint(self) -> str:
        """Equal where ranks, or two runs, see the same file names and sizes in the same order."""
        lines = (b"%s %d\n" % (os.fsencode(file.name), end) for file, end in zip(self.files, self.ends, strict=True))
        return hashlib.sha256(b"".join(lines)).hexdigest()[:16]

    def read(self, start: int, length: int) -> np.ndarray:
        """The bytes [start, start + length) as uint8."""
        window = np.full(length, SEPARATOR, dtype=np.uint8)
        index, stop = bisect_right(self.ends, start), start + length
        while index < len(self.files) and (begin := self.ends[index - 1] if index else 0) < stop:
            first, last = max(start, begin), min(stop, self.ends[index] - 1)
            if first < last:
                # A file that shrank since its size was taken reads as separators, not as an error in mid-run.
                text = np.fromfile(self.files[index], np.uint8, count=last - first, offset=first - begin)
                window[first - start : first - start + len(text)] = text
            index += 1
        return window

    def batch(
        self,
        *,
        seed: int,
        step: int,
        batch_size: int,
        seq_len: int,
        positions: Tensor,
        share: tuple[int, int] = (0, 1),
    ) -> tuple[Tensor, Tensor]:
        """The tokens and labels, int64 [sequences, len(positions)], of one step at `positions` of each sequence.

        share: (n, of) for the n-th of so many equal parts of the batch.
        Labels are shifted in the global sequence, before it is sharded: the label of a shard's last token is there too.
        """
        offsets = np.random.default_rng((seed, step)).integers(0, self.size - seq_len, size=batch_size)
        windows = np.stack([self.read(int(offset), seq_len + 1) for offset in offsets[share[0] :: share[1]]])
        local = positions.cpu().numpy()
        tokens, labels = windows[:, local], windows[:, local + 1]
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))


def open_corpus(data: Path | None, seq_len: int) -> Corpus:
    """The corpus of `--data`; a ValueError where there is none, or where it is shorter than a sequence."""
    return corpus_of(standard_library() if data is None else text_files(data), data, seq_len, "--data")


def open_held_out(data: Path | None, seq_len: int) -> Corpus:
    """The corpus of `--held-out`, which no run has trained on; by default what the default of `--data` leaves out."""
    files = standard_library(tests=True) if data is None else text_files(data, "--held-out")
    return corpus_of(files, data or "this Python", seq_len, "--held-out")


def corpus_of(files: tuple[Path, ...], source: object, seq_len: int, option: str) -> Corpus:
    """The files as documents; a ValueError for the option where they are fewer or shorter than a sequence needs."""
    if not files:
        raise ValueError(f"{option}: {source} holds no text file; give a text file or a folder of text files")
    ends = tuple(accumulate(file.stat().st_size + 1 for file in files))
    if ends[-1] < seq_len + 1:
        remedy = f" or set --seq-len to at most {ends[-1] - 1}" if ends[-1] > 1 else ""
        raise ValueError(
            f"--seq-len: {seq_len} tokens need {seq_len + 1} bytes of text (the last token has a label too), but "
            f"{option} has {ends[-1]}, separators included; give more text{remedy}"
        )
    return Corpus(files, ends)


def standard_library(*, tests: bool = False) -> tuple[Path, ...]:
    """The source of the running Python's standard library, either its tests or all else. It is on every machine."""
    root, files = sysconfig.get_paths()["stdlib"], list[str]()
    # Strings, since thousands of paths would take half a second; and without a look at what is installed beside it.
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages", "__pycache__")]
        is_test = not {"test", "tests", "idle_test"}.isdisjoint(os.path.relpath(folder, root).split(os.sep))
        files += [os.path.join(folder, name) for name in names if name.endswith(".py") and is_test == tests]
    return tuple(map(Path, sorted(files, key=lambda file: file.split(os.sep))))


def text_files(data: Path, option: str = "--data") -> tuple[Path, ...]:
    """`data` itself if it is a file, else the text files below it in the order of their paths, hidden ones left out."""
    if data.is_file():
        return (data,)
    if not data.is_dir():
        raise ValueError(f"{option}: {data} does not exist; give a text file or a folder of text files")
    visible = (
        file for file in data.rglob("*") if not any(part.startswith(".") for part in file.relative_to(data).parts)
    )
    return tuple(sorted(file for file in visible if file.is_file() and is_text(file)))


def is_text(file: Path) -> bool:
    """Whether the beginning of the file holds no byte 0, the rule by which git tells text from binary."""
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)
