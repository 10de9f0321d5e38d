"""Real ranks with different calls or arguments: a ValueError on each, and the group stays usable."""

import pytest
import torch
import torch.distributed as dist

import distflash as df

S, W = 12, 3


def attend(cp, **options):
    x = torch.zeros(1, S // W, 2, 8, requires_grad=True)
    return df.attention(x, x, x, cp=cp, **options)


KINDS = {
    "attention forward": attend,
    "unshard": lambda cp: cp.unshard(torch.zeros(1, S // W)),
    "batch": lambda cp: cp.agree("batch", seq_len=S, mask=df.Causal()),
    "settings": lambda cp: cp.refuse("settings: not these", "settings"),
}


def error_of(work, *args):
    """As a rank: what it says; then one good call, since the ranks must be where they were."""
    cp = df.ContextParallel(dist.group.WORLD)
    with pytest.raises(ValueError) as error:
        work(cp, *args)
    attend(cp).sum().backward()
    return str(error.value)


def make_calls(cp, kinds):
    KINDS[kinds[cp.rank]](cp)


@pytest.mark.parametrize("left_out", KINDS)
def test_ranks_in_different_kinds_of_call(left_out, ranks_of):
    """Rows of different widths would end the processes."""
    kinds = [kind for kind in KINDS if kind != left_out]
    texts = ranks_of(W).run(error_of, make_calls, kinds)
    for rank, text in enumerate(texts):
        if kinds[rank] == "settings":
            assert text == "settings: not these"
        else:
            assert all(f"rank {r} the {kind}" in text for r, kind in enumerate(kinds)), text


def skip_one(cp):
    sum(attend(cp).sum() for _ in range(3 - (cp.rank == 1))).backward()


def swap_two(cp):
    first, second = attend(cp), attend(cp)
    for out in (first, second) if cp.rank == 1 else (second, first):
        out.sum().backward()


def without_gradient(cp):
    with torch.set_grad_enabled(cp.rank != 1):
        attend(cp)


MISTAKES = {
    skip_one: "ranks 0, 2 the attention forward of call 3, rank 1 the attention backward of call 2",
    swap_two: "ranks 0, 2 the attention backward of call 2, rank 1 the attention backward of call 1",
    without_gradient: "needs a gradient differs between ranks 0, 2 and rank 1",
}


@pytest.mark.parametrize("work", MISTAKES, ids=lambda work: work.__name__)
def test_calls_that_are_not_the_same(work, ranks_of):
    for rank, text in enumerate(ranks_of(W).run(error_of, work)):
        assert MISTAKES[work] in text and f"This is rank {rank}." in text
