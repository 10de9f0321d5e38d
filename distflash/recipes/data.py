"""Text as bytes, and the batch of each step, which depends on seed and step only, not on the ranks."""

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

SEPARATOR = 0  # follows every document; no text has this byte


@dataclass(frozen=True)
class Corpus:
    """Concatenated documents, each followed by a separator. Files are read only where a window needs them.

    files: the documents. ends [len(files)]: the offset after each one's separator.
    """

    files: tuple[Path, ...]
    ends: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all documents and separators."""
        return self.ends[-1]

    def fingerprint(self) -> str:
        """A digest of file names and sizes in order, to compare ranks or runs."""
        lines = (b"%s %d\n" % (os.fsencode(file.name), end) for file, end in zip(self.files, self.ends, strict=True))
        return hashlib.sha256(b"".join(lines)).hexdigest()[:16]

    def read(self, start: int, length: int) -> np.ndarray:
        """The bytes [start, start + length) as uint8."""
        window = np.full(length, SEPARATOR, dtype=np.uint8)
        index, stop = bisect_right(self.ends, start), start + length
        while index < len(self.files) and (begin := self.ends[index - 1] if index else 0) < stop:
            first, last = max(start, begin), min(stop, self.ends[index] - 1)
            if first < last:
                # A file that has shrunk since is padded with separators, so that the run goes on.
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
        """The tokens and labels of one step at `positions` of each sequence: int64 [sequences, len(positions)].

        share: (n, count) for part n of `count` equal parts of the batch.
        Labels are shifted before sharding, so the last token of a shard has its label.
        """
        offsets = np.random.default_rng((seed, step)).integers(0, self.size - seq_len, size=batch_size)
        windows = np.stack([self.read(int(offset), seq_len + 1) for offset in offsets[share[0] :: share[1]]])
        local = positions.cpu().numpy()
        tokens, labels = windows[:, local], windows[:, local + 1]
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))


def open_corpus(data: Path | None, seq_len: int) -> Corpus:
    """The corpus of `--data`. Raises a ValueError if there is none, or if it is shorter than a sequence."""
    return corpus_of(standard_library() if data is None else text_files(data), data, seq_len, "--data")


def open_held_out(data: Path | None, seq_len: int) -> Corpus:
    """The corpus of `--held-out`; by default Python's tests, which the default of `--data` excludes."""
    files = standard_library(tests=True) if data is None else text_files(data, "--held-out")
    return corpus_of(files, data or "this Python", seq_len, "--held-out")


def corpus_of(files: tuple[Path, ...], source: object, seq_len: int, option: str) -> Corpus:
    """The files as documents. Raises a ValueError for the option if they are shorter than a sequence."""
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
    """The source files of Python's standard library, either its tests or the rest. Every machine has them."""
    root, files = sysconfig.get_paths()["stdlib"], list[str]()
    # Strings, because thousands of Path objects take half a second. Installed packages are skipped.
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages", "__pycache__")]
        is_test = not {"test", "tests", "idle_test"}.isdisjoint(os.path.relpath(folder, root).split(os.sep))
        files += [os.path.join(folder, name) for name in names if name.endswith(".py") and is_test == tests]
    return tuple(map(Path, sorted(files, key=lambda file: file.split(os.sep))))


def text_files(data: Path, option: str = "--data") -> tuple[Path, ...]:
    """`data` if it is a file, else the text files below it, sorted by path, without hidden ones."""
    if data.is_file():
        return (data,)
    if not data.is_dir():
        raise ValueError(f"{option}: {data} does not exist; give a text file or a folder of text files")
    visible = (
        file for file in data.rglob("*") if not any(part.startswith(".") for part in file.relative_to(data).parts)
    )
    return tuple(sorted(file for file in visible if file.is_file() and is_text(file)))


def is_text(file: Path) -> bool:
    """Whether the first 8192 bytes have no byte 0: git's rule for text files."""
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)
