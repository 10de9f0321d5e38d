"""Rows that a gathered layer runs on: pieces contain what it reads, and each local token is kept once."""

from itertools import pairwise

import pytest
import torch

import distflash as df
from distflash.integrations import transformers as tf
from distflash.integrations.transformers.reach import Before, Everything, reach
from distflash.transport import Simulator

S = 29


def windows(x, cu_seqlens, left):
    """The sum of each token and those before it in its document, and of its place there."""
    parts = []
    for a, b in pairwise(cu_seqlens):
        padded = torch.nn.functional.pad(x[:, a:b], (0, 0, left, 0))
        parts.append(padded.unfold(1, left + 1, 1).sum(-1) + torch.arange(b - a)[:, None])
    return torch.cat(parts, 1)


@pytest.mark.parametrize("layout", [df.Zigzag(), df.Contiguous()], ids=repr)
@pytest.mark.parametrize("cu_seqlens", [(0, S), (0, 1, 5, S), (0, 14, 15, 16, S)], ids=str)
@pytest.mark.parametrize("left", [1, 2, 7])
def test_pieces_hold_what_a_window_reads(layout, cu_seqlens, left):
    x = torch.randn(2, S, 3, dtype=torch.float64)

    def work(transport):
        cp = df.ContextParallel(transport, layout)
        shard = tf.Shard(layout, 3, cp.rank, S, df.Documents(cu_seqlens))
        seen = Before(left)
        rows = seen.fetch(cp.shard(x), shard, cp)
        outputs = []
        for piece in seen.pieces(shard):
            own = rows[:, piece.rows.start : piece.rows.stop]
            outputs.append(windows(own, (0, own.shape[1]), left) + piece.start)
        return cp.unshard(torch.cat(outputs, 1)[:, seen.kept(shard)])

    for got in Simulator(3).run(work):
        torch.testing.assert_close(got, windows(x, cu_seqlens, left))


def test_a_layout_of_single_tokens_gathers_instead():
    for layout, expected in ((df.Striped(), Everything()), (df.Zigzag(), Before(2)), (df.Contiguous(), Before(2))):
        assert {type(reach(2, tf.Shard(layout, 3, rank, S, None))) for rank in range(3)} == {type(expected)}
    assert reach(None, tf.Shard(df.Zigzag(), 3, 0, S, None)) == Everything()
