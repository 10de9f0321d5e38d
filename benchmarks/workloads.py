"""The masks and layouts that benchmarks name on their command lines."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

from torch import Tensor

import distflash as df

LAYOUTS: dict[str, df.Layout] = {"zigzag": df.Zigzag(), "contiguous": df.Contiguous(), "striped": df.Striped()}


def document_lengths(seq_len: int, seed: int = 0, shortest: int = 256, longest: int = 32768) -> list[int]:
    """Lengths of documents packed into ``seq_len`` tokens, drawn log-uniformly; the last one is cut off at the end."""
    generator, lengths, left = random.Random(seed), [], seq_len
    while left:
        length = int(shortest * (longest / shortest) ** generator.uniform(0, 1))
        lengths.append(min(length, left))
        left -= lengths[-1]
    return lengths


def documents(seq_len: int) -> df.Mask:
    """Causal within packed documents of 256 to 32K tokens; shorter ones where the sequence is short itself."""
    longest = max(2, min(32768, seq_len // 2))
    lengths = document_lengths(seq_len, shortest=max(1, min(256, longest // 8)), longest=longest)
    return df.Causal() & df.Documents([0, *accumulate(lengths)])


def window(seq_len: int) -> df.Mask:
    """Causal, the last 4096 keys, the query's own among them; fewer where the sequence is short itself."""
    return df.Window(max(1, min(4096, seq_len // 2)) - 1, 0)


MASKS: dict[str, Callable[[int], df.Mask]] = {
    "causal": lambda seq_len: df.Causal(),
    "full": lambda seq_len: df.Full(),
    "window4096": window,
    "documents": documents,
}

# Those whose work grows as the square of the length; that of the others grows as the length.
DENSE = ("causal", "full")


def balance(pairs: Tensor) -> float:
    """The work of the rank that has most over the mean, from the pairs ``[W, W]`` of each rank with each owner."""
    work = pairs.sum(1).double()
    return float(work.max() / work.mean())
