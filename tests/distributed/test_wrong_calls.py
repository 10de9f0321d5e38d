"""Some wrong calls on real processes: the same message on every rank, and the group stays usable."""

import re

import pytest
import torch
import torch.distributed as dist

import distflash as df
from tests.wrong_calls import tensors
from tests.wrong_chunks import ROWS

NAMED = {row.what: row for row in ROWS}
BY_ALL = [
    "mixed dtypes in k", "float8", "sparse q", "jagged", "heads first, alike", "scale is a parameter", "scale a head",
    "causal", "cu_seqlens_q", "a mask of booleans", "seq_len beyond int64", "a dual number as q", "torch.func.jvp",
    "torch.func.grad", "double backward", "a mask that wraps around", "a layout that loses tokens",
    "unshard other dtypes", "unshard other dimensions", "no reduction", "not sharded", "a chunk beyond the keys",
    "more masks than sequences", "a row that falls", "a kv_layout that loses tokens",
]  # fmt: skip
BY_ONE = [
    "q is None", "heads no multiple of kv_heads", "complex numbers", "a DTensor", "scale as a string", "softcap a head",
    "dropout without a seed", "sinks of the wrong length", "is_causal", "a slip", "no mask", "another length",
    "a learned count", "no reduction", "cross-attention under a mask", "masks for no sequence", "kv_layout as a string",
]  # fmt: skip


def told(what, by_all):
    """Runs as a rank: the error's type and text, where all ranks or rank 1 alone make a wrong call."""
    cp, row = df.ContextParallel(dist.group.WORLD), NAMED[what]
    with pytest.raises(Exception) as caught:
        (row.call if by_all or cp.rank == 1 else row.right)(cp)
    # The group is in order: a good call goes through.
    assert df.attention(**tensors(), cp=cp).shape == (1, 4, 4, 16)
    assert cp.mean(torch.ones(()), 1, reduction="sum") == 1
    return caught.type.__name__, str(caught.value)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", BY_ALL)
def test_all_ranks_are_told(what, ranks_of):
    for kind, text in ranks_of(2).run(told, what, True):
        assert kind == NAMED[what].error.__name__ and re.match(NAMED[what].words, text), f"{kind}: {text}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", BY_ONE)
def test_a_rank_that_makes_it_alone_stops_the_other(what, ranks_of):
    (_, right), (kind, wrong) = ranks_of(2).run(told, what, False)
    assert kind == NAMED[what].error.__name__ and re.match(NAMED[what].words, wrong), f"{kind}: {wrong}"
    assert re.match(".*rank 1 refused|token_count: a rank refused", right), right


def mapped():
    """Runs as a rank: the result of vmap and its gradients over a group, and those of a loop on one device."""
    torch.manual_seed(0)
    cp, q = df.ContextParallel(dist.group.WORLD), torch.randn(3, 1, 5, 2, 8, dtype=torch.float64)
    mine = cp.shard(q, 2).requires_grad_()
    out = cp.unshard(torch.func.vmap(lambda x: df.attention(x, x, x, cp=cp, seq_len=5))(mine), 2)
    (out[..., 0].sum() / cp.world_size).backward()
    whole = q.requires_grad_()
    expected = torch.stack([df.attention(x, x, x) for x in whole])
    expected[..., 0].sum().backward()
    return out.detach(), expected.detach(), mine.grad, cp.shard(whole.grad, 2)


def test_vmap_over_ranks(ranks_of):
    for out, expected, grad, whole in ranks_of(2).run(mapped):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, whole, rtol=1e-12, atol=1e-12)
