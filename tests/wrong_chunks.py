"""More wrong calls, as in `tests.wrong_calls`: chunks of queries, cross-attention, and masks per sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import distflash as df
from tests import wrong_calls
from tests.wrong_calls import NO, SEQ_LEN, Falls, Loses, Wraps, Wrong, attend, making, tensors

zeros = torch.zeros
TOKENS = "expected a number of tokens, an int of at least 0"
BEYOND = "reach beyond the 8 keys; under .* queries are tokens of the keys' sequence. Pass seq_len, or mask=df.Full"


class Many(df.Mask):
    """As many parts as no call may have."""

    def parts(self, positions: torch.Tensor, seq_len: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return ((positions, positions + 1), *((positions, positions) for _ in range(16)))


@dataclass(frozen=True)
class Listed(df.Contiguous):
    """Its fields cannot be hashed."""

    ends: list[int]


def chunk(what: str, words: str, tokens: int, **changes: Any) -> Wrong:
    """A call in which the rank holds so many queries."""
    return attend(what, words, q=zeros(1, tokens, 4, 16), **changes)


def planned(what: str, words: str, **changes: Any) -> Wrong:
    """What is found as the plan is made, after the ranks have agreed."""
    return Wrong(what, lambda cp: df.attention(**tensors(), cp=cp, **changes), words)


CHUNKS = [
    attend("q_start as a float", f"q_start: {TOKENS} .*, got 2.0", q_start=2.0),
    attend("q_start as a string", f"q_start: {TOKENS} .*, got '2'", q_start="2", q_len=2),
    attend("q_start as a bool", f"q_start: {TOKENS} .*, got True", q_start=True),
    attend("q_start of None", f"q_start: {TOKENS} .*, got None", q_start=None),
    attend("q_start of each sequence", f"q_start: {TOKENS} .*, got a Tensor", q_start=torch.tensor([2, 2])),
    attend("negative q_start", f"q_start: {TOKENS} and at most 2147483647, got -2", q_start=-2, q_len=2),
    attend("q_start beyond int32", f"q_start: {TOKENS} and at most 2147483647, got {2**31}", q_start=2**31),
    attend("q_len as a float", f"q_len: {TOKENS} .*, got 2.0", q_len=2.0),
    attend("q_len as a list", rf"q_len: {TOKENS} .*, got \[2\]", q_len=[2]),
    attend("negative q_len", f"q_len: {TOKENS} .*, got -1", q_len=-1),
    chunk("queries beyond int32",
        "q_start, q_len: queries at 2147483647 to 2147483651; expected positions below 2147483647",
        2, q_start=2**31 - 1, q_len=4),
    chunk("a chunk beyond the keys",
        f"q_start, q_len: queries at 5 to 9 {BEYOND}", 2, mask=df.Causal(), q_start=5, q_len=4),
    chunk("cross-attention under a mask",
        f"q_start, q_len: queries at 0 to 20 {BEYOND}", 10, mask=df.Window(3), q_len=20),
    chunk("cross-attention under rows",
        rf"q_start, q_len: queries at 0 to 10 {BEYOND}", 5, mask=df.Rows([df.Full()]), q_len=10),
    attend("a chunk of another length than held",
        r"q: 4 local tokens, but Zigzag\(\) gives rank \d of 2 2 of q_len=4; shard the chunk by itself, with cp.shard",
        q_start=2, q_len=4),
    attend("a chunk whose keys are of another length",
        r"k: 4 local tokens, but Zigzag\(\) gives rank \d of 2 8 of seq_len=16", q_start=2, q_len=8, seq_len=16),
    attend("keys and values of other lengths", "v: 3 local tokens differ from k's 4", q_len=8, v=zeros(1, 3, 2, 16)),
    chunk("cross-attention without q_len",
        r"q: 6 local tokens, but Zigzag\(\) gives rank \d of 2 4 of q_len=8; .*and pass q_len where",
        6, kv_layout=df.Contiguous()),
    attend("kv_layout as a string",
        "kv_layout: expected a Layout such as .*got 'zigzag'; objects, not strings", kv_layout="zigzag"),
    attend("kv_layout as a class", r"kv_layout: expected .*not the class: Striped\(\)", kv_layout=df.Striped),
    attend("keys in another layout than kv_layout",
        r"k: 4 local tokens, but Striped\(\) gives rank \d of 2 1 of seq_len=2", kv_layout=df.Striped(), seq_len=2),
    attend("a kv_layout with a list",
        r"kv_layout: expected a layout that can be hashed, .*Listed\(ends=\[8\]\).*make it a frozen dataclass",
        kv_layout=Listed([8])),
    planned("a kv_layout that loses tokens",
        r"layout: Loses\(\).*hold each of the 8 positions once", kv_layout=Loses()),
    attend("an offset", f"q_offset: {NO} write q_start=, .* and q_len=", q_offset=4),
    attend("the cache's length", f"cache_seqlens: {NO} write cache=, .* q_start=", cache_seqlens=4),
    attend("a slip in q_start", rf"qstart: {NO} did you mean q_start=\?", qstart=4),
    Wrong("a plan of a chunk beyond the keys",
        lambda cp: cp.plan(df.Causal(), 8, q_start=5, q_len=4), f"q_start, q_len: queries at 5 to 9 {BEYOND}"),
    Wrong("a plan that starts beyond the keys",
        lambda cp: cp.plan(df.Causal(), 8, q_start=9), f"q_start, q_len: queries at 9 to 9 {BEYOND}"),
    Wrong("a plan of no start", lambda cp: cp.plan(df.Causal(), 8, q_start=None), f"q_start: {TOKENS} .*, got None"),
    Wrong("a plan of half a chunk", lambda cp: cp.plan(df.Causal(), 8, q_len=0.5), f"q_len: {TOKENS} .*, got 0.5"),
    Wrong("a plan with a kv_layout with a list",
        lambda cp: cp.plan(df.Causal(), 8, kv_layout=Listed([8])), "kv_layout: expected a layout that can be hashed"),
    Wrong("a plan with a kv_layout as a string",
        lambda cp: cp.plan(df.Causal(), 8, kv_layout="zigzag"), "kv_layout: expected a Layout"),
]  # fmt: skip

COUNT = "of the batch, but masks"
BATCHES = [
    attend("more masks than sequences",
        "mask: Rows of 2 masks for a batch of 1 sequences; expected one mask for each",
        mask=df.Rows([df.Causal()] * 2)),
    attend("masks for no sequence", "mask: Rows of 0 masks for a batch of 1 sequences", mask=df.Rows([])),
    attend("documents of another length in a row",
        "mask: cu_seqlens end at 9 but seq_len is 8", mask=df.Rows([df.Documents([0, 9])]), seq_len=8),
    attend("rows beyond int32", f"{SEQ_LEN} and at most", mask=df.Rows([df.Documents([0, 2**40])])),
    planned("a row that wraps around",
        "mask: Wraps.*wrapped around at int64's limits", mask=df.Rows([Wraps(2**63 - 1)])),
    planned("a row that falls", "mask: .*Falls.*numbers that never decrease", mask=df.Rows([Falls()])),
    planned("rows of more intervals than passes",
        "mask: Rows.* 17 intervals of keys that cannot be joined; expected at most 16", mask=df.Rows([Many()])),
    making("one mask for all rows",
        lambda: df.Rows(df.Causal()),
        r"Rows\(masks\): expected a sequence of masks, .*got Causal\(\); a mask for all of them is passed as it is"),
    making("a number of rows", lambda: df.Rows(3), r"Rows\(masks\): expected a sequence of masks, .*got 3"),
    making("a row of None",
        lambda: df.Rows([df.Causal(), None]), rf"Rows\(masks\): expected a mask .* {COUNT}\[1\] is None"),
    making("rows of a string", lambda: df.Rows("causal"), rf"Rows\(masks\): .* {COUNT}\[0\] is 'c'"),
    making("rows of classes", lambda: df.Rows([df.Causal]), rf"Rows\(masks\): .* {COUNT}\[0\] is <class"),
    making("rows of rows", lambda: df.Rows([df.Rows([df.Causal()])]), rf"Rows\(masks\): .* {COUNT}\[0\] is Rows"),
    making("rows of two lengths",
        lambda: df.Rows([df.Causal(), df.Documents([0, 8]), df.Documents([0, 9])]),
        r"Rows\(masks\): masks\[1\] is for sequences of 8 tokens and masks\[2\] of 9; .*padding included"),
    making("rows and a mask of two lengths",
        lambda: df.Rows([df.Documents([0, 8])]) & df.Documents([0, 9]), "mask: .*different lengths, 8 and 9"),
    making("rows for batches of two sizes",
        lambda: df.Rows([df.Causal()]) | df.Rows([df.Causal()] * 2),
        "mask: the two sides of & or | have masks for 1 and for 2 sequences"),
    Wrong("a plan of rows beyond int32",
        lambda cp: cp.plan(df.Rows([df.Causal()] * 3), 2**30),
        "mask: Rows of 3 sequences of 1073741824 tokens are computed as one of 3221225472; expected at most 2147483647;"
        " make several calls"),
    Wrong("positions of rows",
        lambda cp: cp.positions_of(zeros(1, 4), 8, df.Rows([df.Causal()] * 2)),
        "mask: Rows of 2 masks for a batch of 1"),
]  # fmt: skip

ROWS = [*wrong_calls.ROWS, *CHUNKS, *BATCHES]
