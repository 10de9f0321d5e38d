import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from benchmarks.workloads import corpus, full_corpus
from distflash.geometry import Geometry
from tests.dense import Problem, assert_exact, join, make_inputs, on_rank, on_ranks
from tests.strategies import examples, problems, problems_of_rows, schedules

DOCUMENTS = df.Causal() & df.Documents([0, 3, 40, 41, 44, 90, 131])


@examples(20)
@given(problems(), st.integers(1, 8), schedules, st.integers(1, 20), st.sampled_from(["equal", 0.0, 30.0]))
def test_exact_in_the_layout_of_its_mask(p, world_size, schedule, chunk, tokens):
    x = make_inputs(p)
    layout = df.Balanced(p.mask, chunk, tokens)
    assert_exact(p, x, on_ranks(p, x, world_size, layout, schedule=schedule))


@examples(10)
@given(problems_of_rows(), st.integers(1, 4))
def test_exact_where_sequences_have_masks_of_their_own(p, world_size):
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, world_size, df.Balanced(p.mask, chunk=2)))


# Chunks of 12 tokens are fewer than the ranks.
@pytest.mark.covering(2, schedule=[df.Ring(), df.AllGather(), df.DoubleRing(4), df.PassQuery()], chunk=[4, 12])
def test_exact_on_many_ranks(schedule, chunk):
    p = Problem(DOCUMENTS, seq_len=131, d_qk=8, d_v=8, sinks=True)
    x = make_inputs(p)
    assert_exact(p, x, on_ranks(p, x, 16, df.Balanced(DOCUMENTS, chunk), schedule=schedule))


@pytest.mark.parametrize("masks", [corpus, full_corpus])
@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_have_equally_many_tokens_and_nearly_as_many_pairs(ranks, masks):
    seq_len = ranks * 8192
    for seed in range(2):
        mask = masks(seq_len, seed)
        layout = df.Balanced(mask)
        assert {layout.length(seq_len, ranks, rank) for rank in range(ranks)} == {8192}
        found, others = (moved_and_balance(mask, each, seq_len, ranks) for each in (layout, df.Zigzag()))
        assert found[1] <= max(1.06, 0.6 * others[1])
        if ranks == 2:
            assert found[0] <= 1.3 * others[0] + 2048


def moved_and_balance(mask, layout, seq_len, ranks):
    needs = Geometry.of_sequence(mask, layout, seq_len, ranks).needs
    moved = sum(sum(map(len, runs)) for r, row in enumerate(needs.rows) for s, runs in enumerate(row) if s != r)
    pairs = needs.pairs.sum(1).double()
    return moved, float(pairs.max() / pairs.mean())


def test_weighed_tokens():
    """Documents of 1000 and of 10 x 100: by pairs alone the long one outweighs all others."""
    mask = df.Causal() & df.Documents([0, 1000, *range(1100, 2001, 100)])
    lengths = {cost: [df.Balanced(mask, 50, cost).length(2000, 2, rank) for rank in range(2)] for cost in (0.0, 1e6)}
    assert abs(lengths[0.0][0] - lengths[0.0][1]) > 500 and abs(lengths[1e6][0] - lengths[1e6][1]) <= 120


def attend(transport, p, x, mask):
    cp = df.ContextParallel(transport, df.Balanced(chunk=4), kernel=df.kernels.Reference())
    bound = cp.with_mask(mask)
    assert bound.transport is cp.transport and bound.calls is cp.calls and cp.layout.mask is None
    assert torch.equal(cp.with_mask(mask).positions(p.seq_len), bound.positions(p.seq_len))
    return on_rank(p, x, bound)


@pytest.mark.parametrize("mask", [DOCUMENTS, df.Causal() & df.Documents([0, 100, 131]), df.Window(9)], ids=repr)
def test_a_layout_for_a_batch(mask):
    p = Problem(mask, seq_len=131)
    x = make_inputs(p)
    parts = df.transport.Simulator(3).run(lambda transport: attend(transport, p, x, mask))
    assert_exact(p, x, join(parts, df.Balanced(mask, chunk=4), 131))


def test_layouts_that_take_no_mask_are_the_same_for_all():
    cp = df.ContextParallel(df.transport.Alone(), df.Zigzag())
    assert cp.with_mask(DOCUMENTS) is cp


def test_ranks_with_other_batches_are_told():
    def run(transport):
        ends = [0, 50, 131] if transport.rank else [0, 60, 131]
        mask = df.Causal() & df.Documents(ends)
        cp = df.ContextParallel(transport, df.Balanced()).with_mask(mask)
        x = torch.zeros(1, cp.seq_local(131), 1, 8)
        with pytest.raises(ValueError, match=r"disagree .*mask differs .*layout differs"):
            df.attention(x, x, x, mask=mask, cp=cp)

    df.transport.Simulator(2).run(run)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda cp: cp.shard(torch.zeros(1, 8)), r"layout: Balanced\(\) needs a mask.*cp.with_mask\(mask\)"),
        (lambda cp: cp.plan(df.Causal(), 8), r"layout: Balanced\(\) needs a mask"),
        (lambda cp: df.attention(*[torch.zeros(1, 4, 1, 8)] * 3, mask=df.Causal(), cp=cp), "needs a mask"),
        (lambda cp: cp.with_mask(df.Documents([0, 5])).positions(8), "is for a mask of 5 tokens, not for 8"),
        (lambda cp: cp.with_mask("causal"), "mask: expected a Mask"),
        (lambda cp: df.Balanced("causal"), "mask: expected a Mask"),
        (lambda cp: df.Balanced(chunk=0), "chunk"),
        (lambda cp: df.Balanced(tokens="weighed"), 'tokens: expected "equal"'),
        (lambda cp: df.Balanced(tokens=-1), "tokens: expected"),
    ],
)
def test_wrong_uses(use, words):
    def run(transport):
        with pytest.raises(ValueError, match=words):
            use(df.ContextParallel(transport, df.Balanced()))

    df.transport.Simulator(2).run(run)
