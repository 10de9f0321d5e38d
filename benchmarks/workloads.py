"""The masks and layouts that benchmarks name on their command lines."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, pairwise

from torch import Tensor

import distflash as df

LAYOUTS: dict[str, df.Layout] = {
    "zigzag": df.Zigzag(),
    "contiguous": df.Contiguous(),
    "striped": df.Striped(),
    "balanced": df.Balanced(),  # for the mask of each call: layout.under(mask), cp.with_mask(mask)
}

# Documents of a training corpus by their lengths: the last length of a bin, and how many documents are in it. From the
# table of MagiAttention's distributed benchmark (https://github.com/SandAI-org/MagiAttention, exps/dist_attn).
CORPUS = (
    (10, 30254), (50, 391188), (100, 699596), (200, 1377757), (500, 3794735), (1024, 3316785), (2048, 2106566),
    (4096, 988525), (8192, 410002), (16384, 173574), (32768, 115007), (65536, 18428), (131072, 22513), (196608, 18284),
)  # fmt: skip


def corpus_batch(seq_len: int, seed: int = 0) -> list[int]:
    """Cumulative lengths of documents of `CORPUS` packed into ``seq_len`` tokens, each at most a quarter of them."""
    generator, ends = random.Random(seed), [0]
    lasts, counts = zip(*CORPUS, strict=True)
    while ends[-1] < seq_len:
        (at,) = generator.choices(range(len(lasts)), counts)
        length = generator.randint(lasts[at - 1] + 1 if at else 1, lasts[at])
        ends.append(min(seq_len, ends[-1] + min(length, max(1, seq_len // 4))))
    return ends


def corpus(seq_len: int, seed: int = 0) -> df.Mask:
    """Causal within documents as long as those of a training corpus."""
    return df.Causal() & df.Documents(corpus_batch(seq_len, seed))


def full_corpus(seq_len: int, seed: int = 0) -> df.Mask:
    """The same documents, within which every token sees every other one."""
    return df.Documents(corpus_batch(seq_len, seed))


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


def streaming(seq_len: int) -> df.Mask:
    """The window and the first 4 keys (StreamingLLM)."""
    return df.Causal() & (window(seq_len) | df.FirstTokens(4))


def rollouts(seq_len: int) -> df.Mask:
    """Continuations of 1024 tokens, each of one prompt of 4096; shorter ones where the sequence is short itself."""
    prompt = max(1, min(4096, seq_len // 4))
    length = max(1, min(1024, seq_len // 8))
    lengths = [prompt, *[length] * ((seq_len - prompt) // length)]
    rest = seq_len - sum(lengths)
    lengths += [rest] if rest else []
    return df.Tree([-1, *[0] * (len(lengths) - 1)], lengths)


def blocks(seq_len: int) -> df.Mask:
    """Packed videos of 1 to 8 blocks of 4096 tokens: block-causal within each, its last block cut short where it ends.

    Blocks count from each video's start. Where the sequence is short itself they are shorter.
    """
    size = max(1, min(4096, seq_len // 16))
    starts = [0, *accumulate(document_lengths(seq_len, shortest=size, longest=8 * size))]
    boundaries = [block for start, stop in pairwise(starts) for block in range(start, stop, size)]
    return df.Documents(starts) & df.BlockCausal([*boundaries, seq_len])


MASKS: dict[str, Callable[[int], df.Mask]] = {
    "causal": lambda seq_len: df.Causal(),
    "full": lambda seq_len: df.Full(),
    "window4096": window,
    "documents": documents,
    "corpus": corpus,
    "full-corpus": full_corpus,
    "streaming": streaming,
    "rollouts": rollouts,
    "blocks": blocks,
}

# Those whose work grows as the square of the length; that of the others grows as the length.
DENSE = ("causal", "full")


def balance(pairs: Tensor) -> float:
    """The work of the rank that has most over the mean, from the pairs ``[W, W]`` of each rank with each owner."""
    work = pairs.sum(1).double()
    return float(work.max() / work.mean())
