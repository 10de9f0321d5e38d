"""`torch.compile` with a mask per sequence, and with chunks of queries: one graph."""

from dataclasses import dataclass

import pytest
import torch

import distflash as df
from distflash.compiled import join, split
from tests.pure.test_compiled import CP, Layer, S, assert_same, compiled, packed

STEPS = 2 * torch._dynamo.config.recompile_limit


@pytest.fixture(autouse=True)
def no_earlier_graphs():
    torch._dynamo.reset()


def batch(rows=2, queries=S):
    """q, k and v of so many sequences."""
    return [torch.randn(rows, tokens, 2, 8, dtype=torch.float64, requires_grad=True) for tokens in (queries, S, S)]


@pytest.mark.parametrize(
    "mask",
    [
        df.Rows([]),
        df.Rows([df.Causal(), df.Window(3)]),
        df.Rows([df.Causal() & df.Documents([0, 5, S]), df.Documents([0, S]) | df.FirstTokens(2)]),
    ],
    ids=repr,
)
def test_join_is_the_inverse_of_split(mask):
    form, data = split(mask, None, 0.0, 0.0)
    assert join(form, data)[0] == mask and hash(form) == hash(split(mask, None, 0.0, 0.0)[0])


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: df.Causal() & m, lambda m: m | df.FirstTokens(1)])
def test_rows_that_change_in_every_step(wrap):
    """Given from outside, as one packed batch after another."""
    layer = Layer()
    fast, counter = compiled(layer)
    for step in range(STEPS):
        rows = df.Rows([df.Documents(packed(1 + (step + n) % 7)) for n in range(2)])
        assert_same(fast, layer, *batch(), mask=wrap(rows))
    assert counter.frame_count <= 2


def test_rows_made_inside_the_compiled_function():
    def function(q, k, v, first, second):
        mask = df.Rows([df.Documents(first), df.Documents(second) & df.Window(3)])
        return df.attention(q, k, v, mask=df.Causal() & mask, cp=CP)

    fast, counter = compiled(function)
    for step in range(STEPS):
        ends = (torch.tensor(packed(1 + (step + n) % 7), dtype=torch.int32) for n in (0, 3))
        assert_same(fast, function, *batch(), *ends)
    assert counter.frame_count <= 2


def test_a_list_of_masks_made_inside():
    def function(q, k, v, lefts):
        return df.attention(q, k, v, mask=df.Rows([df.Window(left) for left in lefts]), cp=CP)

    fast, counter = compiled(function)
    for left in range(2, STEPS):
        assert_same(fast, function, *batch(), (left, 2 * left + 1))
    assert counter.frame_count <= 2


def test_other_rows_than_sequences_are_refused_when_the_graph_runs():
    fast, _ = compiled(Layer(), dynamic=True)
    with pytest.raises(ValueError, match="mask: Rows of 2 masks for a batch of 3 sequences"):
        fast(*batch(3), mask=df.Rows([df.Causal(), df.Full()]))


def test_rows_of_two_lengths_are_refused_when_the_graph_runs():
    def function(q, k, v, first, second):
        return df.attention(q, k, v, mask=df.Rows([df.Documents(first), df.Documents(second)]), cp=CP)

    fast, _ = compiled(function)
    with pytest.raises(ValueError, match=rf"Rows\(masks\): masks\[0\] is for sequences of {S} tokens and masks\[1\]"):
        fast(*batch(), torch.tensor([0, S]), torch.tensor([0, S + 1]))


def test_a_chunk_that_moves():
    """Chunked prefill: q_start is a Python int that changes."""
    layer = Layer(mask=df.Causal(), seq_len=S)
    fast, counter = compiled(layer)
    for start in range(S - 3):
        assert_same(fast, layer, *batch(queries=4), q_start=start, q_len=4)
    assert counter.frame_count <= 4  # 0 and 1 are special to the compiler


def test_chunks_of_all_lengths():
    layer = Layer(mask=df.Window(3, 1))
    fast, counter = compiled(layer, dynamic=True)
    graphs = []  # the compiler begins again when it meets floats
    for start, count in ((2, 5), (3, 4), (7, 5), (5, 6), (4, 2)):
        assert_same(fast, layer, *batch(queries=count), q_start=start, q_len=count)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


def test_cross_attention_in_another_layout():
    layer = Layer(kv_layout=df.Striped())
    fast, counter = compiled(layer, dynamic=True)
    graphs = []
    for count in (5, 40, 17):
        assert_same(fast, layer, *batch(queries=count), q_len=count)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@dataclass(frozen=True)
class Turned(df.Layout):
    """`Contiguous`, some ranks on. As many tokens a rank whatever the field, which has a default."""

    by: int = 0
    cuts: tuple[int, ...] = ()

    def ranges(self, seq_len, world_size, rank):
        return df.Contiguous().ranges(seq_len, world_size, (rank + self.by + sum(self.cuts)) % world_size)


class Plain(df.Layout):
    by = 0

    def __init__(self, by):
        self.by = by

    def ranges(self, seq_len, world_size, rank):
        return Turned(self.by).ranges(seq_len, world_size, rank)


def test_a_layout_made_inside_keeps_its_fields():
    """They are data: one graph serves all. A constant of such an object would have had the class's defaults."""

    def rank(transport):
        cp = df.ContextParallel(transport, df.Contiguous())
        fast, counter = compiled(lambda x, k, by: df.attention(x, k, k, cp=cp, kv_layout=Turned(by, (by, 2)), mask=M))
        for by in range(STEPS):
            k = whole[:, Turned(by, (by, 2)).positions(S, 2, transport.rank)]
            q = cp.shard(whole)
            expected = df.attention(q, k, k, cp=cp, kv_layout=Turned(by, (by, 2)), mask=M)
            assert torch.equal(fast(q, k, by), expected)
        return counter.frame_count

    M, whole = df.Causal(), batch()[0].detach()
    assert max(df.transport.Simulator(2).run(rank)) <= 4  # 0 and 1 are special to the compiler


def test_a_layout_that_is_no_dataclass_is_refused():
    fast, _ = compiled(lambda x: df.attention(x, x, x, kv_layout=Plain(1)))
    with pytest.raises(Exception, match=r"kv_layout: under torch\.compile expected a frozen dataclass"):
        fast(batch()[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(q_start=9, q_len=4), "q_start, q_len: queries at 9 to 13 reach beyond the 12 keys"),
        (dict(q_start=3, q_len=5), "q: 4 local tokens, but .* 5 of q_len=5"),
        (dict(q_start=-3, q_len=4), "q_start: expected a number of tokens, an int of at least 0"),
        (dict(q_start=3, q_len=-4), "q_len: expected a number of tokens, an int of at least 0"),
    ],
    ids=str,
)
def test_wrong_chunks_are_refused_when_the_graph_runs(options, words):
    fast, _ = compiled(Layer(mask=df.Causal()), dynamic=True)
    fast(*batch(queries=4), q_start=3, q_len=4)
    with pytest.raises(ValueError, match=words):
        fast(*batch(queries=4), **options)
