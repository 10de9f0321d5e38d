"""Checks of a call's lengths, global and local. They return the error message or None."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch

from distflash.integers import as_int
from distflash.layouts import Layout
from distflash.mask_algebra import Mask
from distflash.masks import Full
from distflash.rows import Rows
from distflash.validation import ORDER, came, hint

# Positions and mask bounds are int32.
MAX_SEQ_LEN = 2**31 - 1


def seq_len_of(k: Sequence[int], mask: Mask, world_size: int) -> int:
    """The default global length. k: the shape of this rank's keys."""
    return k[1] * world_size if mask.seq_len is None else mask.seq_len


def seq_len_problem(seq_len: object) -> str | None:
    """Check that it is a valid length."""
    words = "seq_len: expected the global length, an int of at least 0"
    if as_int(seq_len) is None:
        return f"{words}, got {came(seq_len)}"
    # Under torch.compile it may be a symbol, on which a comparison would add a guard; `length_problem` checks it later.
    if torch.compiler.is_compiling() or 0 <= index(seq_len) <= MAX_SEQ_LEN:  # type: ignore[arg-type]
        return None
    return f"{words} and at most {MAX_SEQ_LEN}, got {seq_len}"


def documents_problem(mask: Mask, seq_len: int) -> str | None:
    """Check that the mask's own length, if it has one, is ``seq_len``."""
    if mask.seq_len is None or mask.seq_len == seq_len:
        return None
    return f"mask: cu_seqlens end at {mask.seq_len} but seq_len is {seq_len}; they must end at S"


def as_length(seq_len: object) -> int:
    """A length that has passed `seq_len_problem`, as an int, or as a symbol under torch.compile."""
    length = as_int(seq_len)  # not `operator.index`, which would specialise a symbol
    assert length is not None
    return length


def require_seq_len(seq_len: object) -> int:
    """The length as an int. Raises a ValueError if it is none."""
    if (problem := seq_len_problem(seq_len)) is not None:
        raise ValueError(problem)
    return as_length(seq_len)


def length_problem(
    name: str, shape: Sequence[int], mask: Mask, seq_len: int, layout: Layout, world_size: int, rank: int
) -> str | None:
    """Check that argument ``name``, of shape ``[batch, tokens, ...]``, has this rank's tokens of ``seq_len``."""
    if (problem := seq_len_problem(seq_len)) is not None:
        return problem
    if (problem := documents_problem(mask, seq_len)) is not None:
        return problem
    if (problem := layout.refusal(seq_len)) is not None:
        return problem
    expected = layout.length(seq_len, world_size, rank)
    if shape[1] == expected:
        return None
    if len(shape) == 4 and shape[2] == expected:
        return (
            f"{name}: looks heads-first, [batch, heads, seq_local, head_dim], with {shape[1]} heads and {expected} "
            f"tokens on rank {rank} of {world_size}; the order of dimensions is {ORDER}: pass q.transpose(1, 2), "
            "k.transpose(1, 2) and v.transpose(1, 2)"
        )
    return (
        f"{name}: {shape[1]} local tokens, but {layout!r} gives rank {rank} of {world_size} {expected} of "
        f"seq_len={seq_len}; shard with cp.shard or cp.positions(seq_len), and pass seq_len where ranks hold "
        "different numbers of tokens"
    )


def rows_problem(mask: Mask, batch: int | None, seq_len: int) -> str | None:
    """Check that `Rows` has a mask for each sequence. batch: None if unknown."""
    if not isinstance(mask, Rows):
        return None
    rows = len(mask.masks)
    if batch is not None and rows != batch:
        return (
            f"mask: Rows of {rows} masks for a batch of {batch} sequences; expected one mask for each sequence of the "
            "batch"
        )
    if rows * seq_len > MAX_SEQ_LEN:
        return (
            f"mask: Rows of {rows} sequences of {seq_len} tokens are computed as one of {rows * seq_len}; expected at "
            f"most {MAX_SEQ_LEN}; make several calls, each for some of the sequences"
        )
    return None


def queries_problem(q_start: object, q_len: object, kv_layout: object) -> str | None:
    """Check the types and ranges of ``q_start``, ``q_len`` and ``kv_layout``."""
    for name, number in (("q_start", q_start), ("q_len", q_len)):
        if number is None and name == "q_len":
            continue
        whole = as_int(number)
        if whole is None or (not torch.compiler.is_compiling() and not 0 <= whole <= MAX_SEQ_LEN):
            return (
                f"{name}: expected a number of tokens, an int of at least 0 and at most {MAX_SEQ_LEN}, got "
                f"{came(number)}"
            )
    if kv_layout is not None and not isinstance(kv_layout, Layout):
        return f"kv_layout: expected a Layout such as df.Contiguous(), or None, got {came(kv_layout)}{hint(kv_layout)}"
    return None if torch.compiler.is_compiling() else hash_problem("kv_layout", kv_layout)


def hash_problem(name: str, layout: Layout | None) -> str | None:
    """Check that a layout is hashable, since plans are cached by it."""
    try:
        hash(layout)
    except TypeError as error:
        return (
            f"{name}: expected a layout that can be hashed, since plans are kept by it, got {came(layout)} "
            f"({error}); make it a frozen dataclass of numbers and tuples"
        )
    return None


def chunk_problem(
    shape: Sequence[int], q_start: int, q_len: int, seq_len: int, mask: Mask, layout: Layout, world_size: int, rank: int
) -> str | None:
    """Check that queries of shape ``[batch, tokens, ...]`` are this rank's part of a chunk within the keys."""
    # Again, since they were symbols under torch.compile.
    problem = queries_problem(q_start, q_len, None) or chunk_range_problem(q_start, q_len, seq_len, mask)
    problem = problem or layout.refusal(q_len)
    expected = layout.length(q_len, world_size, rank) if problem is None else 0
    if problem is not None or shape[1] == expected:
        return problem
    return (
        f"q: {shape[1]} local tokens, but {layout!r} gives rank {rank} of {world_size} {expected} of q_len={q_len}; "
        "shard the chunk by itself, with cp.shard(chunk), and pass q_len where queries are not as many tokens as keys "
        "or ranks hold different numbers of them"
    )


def chunk_range_problem(q_start: int, q_len: int, seq_len: int, mask: Mask) -> str | None:
    """Check that queries at ``q_start`` to ``q_start + q_len`` are within the keys' sequence."""
    stop = q_start + q_len
    if stop > seq_len and not isinstance(mask, Full):
        return (
            f"q_start, q_len: queries at {q_start} to {stop} reach beyond the {seq_len} keys; under {mask!r} queries "
            "are tokens of the keys' sequence. Pass seq_len, or mask=df.Full() for cross-attention"
        )
    if stop > MAX_SEQ_LEN:
        return f"q_start, q_len: queries at {q_start} to {stop}; expected positions below {MAX_SEQ_LEN}"
    return None


def as_given(seq_len: int | None, q_start: int, q_len: int | None) -> list[int]:
    """The lengths as an op takes them: ints (symbols while compiling), and -1 for None."""
    return [-1 if length is None else as_length(length) for length in (seq_len, q_start, q_len)]
