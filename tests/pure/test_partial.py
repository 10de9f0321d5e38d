import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distflash.partial import Partial, Softmax, accumulator_dtype

CLOSE = dict(rtol=1e-12, atol=1e-12)
ROWS, KEYS, D_V = 6, 9, 4


@st.composite
def scores_and_values(draw):
    """``[6, n], [n, 4]``: rows that see nothing among rows of very different weight; n may be 0 after masking."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    n = draw(st.integers(1, KEYS))
    size = draw(st.sampled_from([1.0, 100.0, 800.0]))
    s = torch.randn(ROWS, n, generator=generator, dtype=torch.float64) * size
    blind = torch.tensor(draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)))
    return s.masked_fill(blind[:, None], -torch.inf), torch.randn(n, D_V, generator=generator, dtype=torch.float64)


softmaxes = scores_and_values().map(lambda drawn: Softmax.of_scores(*drawn))


def over_no_key():
    s = torch.full((ROWS, 1), -torch.inf, dtype=torch.float64)
    return Softmax.of_scores(s, torch.ones(1, D_V, dtype=torch.float64))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert not x.isnan().any()
        torch.testing.assert_close(x, y, **CLOSE)


@given(scores_and_values())
def test_finished_it_is_the_softmax(drawn):
    s, v = drawn
    blind = (s == -torch.inf).all(-1)
    expected = s.softmax(-1).masked_fill(blind[:, None], 0.0) @ v, s.logsumexp(-1)
    assert_same(Softmax.of_scores(s.clone(), v).finish(), expected)


@given(softmaxes, softmaxes)
def test_commutative(a, b):
    assert_same(a.merge(b).finish(), b.merge(a).finish())


@given(softmaxes, softmaxes, softmaxes)
def test_associative(a, b, c):
    assert_same(a.merge(b).merge(c).finish(), a.merge(b.merge(c)).finish())


@given(softmaxes)
def test_no_key_is_the_identity(a):
    assert_same(a.merge(over_no_key()).finish(), a.finish())
    assert_same(over_no_key().merge(a).finish(), a.finish())


def test_over_no_key():
    out, lse = over_no_key().merge(over_no_key()).finish()
    assert (out == 0).all() and (lse == -torch.inf).all()


@given(scores_and_values(), st.integers(0, KEYS))
def test_merging_is_the_softmax_over_both(drawn, cut):
    s, v = drawn
    cut = min(cut, len(v))
    parts = [Softmax.of_scores(s[:, part].clone(), v[part]) for part in (slice(cut), slice(cut, None)) if len(v[part])]
    merged = parts[0] if len(parts) == 1 else parts[0].merge(parts[1])
    assert_same(merged.finish(), Softmax.of_scores(s.clone(), v).finish())


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_room_between_passes(dtype, wide):
    q = torch.empty(2, 3, 4, 8, dtype=dtype)
    assert accumulator_dtype(dtype) == wide
    one, two = (Partial.empty(q, 5, between) for between in (False, True))
    assert one.running is None  # the only hop writes what it rounds
    assert two.running.weighted.shape == two.final.shape == one.final.shape == (2, 3, 4, 5)
    rows = [two.running.maximum, two.running.total, two.lse, one.lse]
    assert all(t.shape == (2, 4, 3) and t.dtype == wide for t in rows)
    assert len({t.data_ptr() for t in rows}) == 4
    assert (two.final.dtype, two.running.weighted.dtype) == (dtype, wide)


def test_no_hop_at_all():
    partial = Partial.empty(torch.empty(2, 3, 4, 8), 5, between=False)
    partial.fill_identity(None)
    assert (partial.final == 0).all() and (partial.lse == -torch.inf).all()
    sinks = torch.arange(4.0)
    partial.fill_identity(sinks)
    assert (partial.final == 0).all() and torch.equal(partial.lse, sinks[None, :, None].expand(2, 4, 3))
