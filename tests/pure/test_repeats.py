"""Repeated calls: looked up by a key, and refused, differentiated and watched as the first call is."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

import distflash as df
from distflash import repeats
from distflash.transport import Alone

pytestmark = pytest.mark.pure

CAUSAL, LAYOUT = df.Causal(), df.Zigzag()
SHAPE = (1, 6, 2, 8)


def tensors(**options):
    torch.manual_seed(0)
    return tuple(torch.randn(SHAPE, **options) for _ in range(3))


def key(q, k, v, mask=CAUSAL, lengths=(None, 0, None), numbers=(None, None, 0.0), max_logits=False):
    return repeats.key_of((q, k, v), mask, LAYOUT, lengths, numbers, max_logits)


def test_a_call_like_one_before_is_not_checked_again(monkeypatch):
    cp = df.ContextParallel(Alone())
    first = df.attention(*tensors(), mask=CAUSAL, cp=cp)
    monkeypatch.setattr("distflash.validation.call_problem", lambda *_: "checked")
    assert torch.equal(df.attention(*tensors(), mask=CAUSAL, cp=cp), first)
    with pytest.raises(ValueError, match="checked"):
        df.attention(*tensors(), mask=df.Causal(), cp=cp)  # another object, which may be another mask


def test_calls_that_differ_have_other_keys():
    q, k, v = tensors()
    other = torch.randn(1, 6, 4, 8)
    different = [
        key(q, k, v),
        key(other, k, v),
        key(q, other, v),
        key(q, k, other),
        *(key(*(x.to(dtype) for x in (q, k, v))) for dtype in (torch.float64, torch.bfloat16)),
        key(q.double(), k, v),
        key(q, k.double(), v),
        key(q, k, v.double()),
        key(*tensors(requires_grad=True)),
        key(q.to_sparse(), k, v),
        key(q, k, v, df.Full()),
        key(q, k, v, lengths=(6, 0, None)),
        key(q, k, v, lengths=(None, 6, None)),
        key(q, k, v, lengths=(None, 0, 6)),
        key(q, k, v, numbers=(0.5, None, 0.0)),
        key(q, k, v, numbers=(None, 0.5, 0.0)),
        key(q, k, v, numbers=(None, None, 0.5)),
        key(q, k, v, max_logits=True),
    ]
    assert None not in different
    for a, b in itertools.combinations(different, 2):
        assert a != b
    assert key(*tensors()) == different[0]
    with torch.no_grad():
        assert key(*tensors(requires_grad=True)) == different[0]


def test_what_has_to_be_checked_anew_has_no_key():
    q, k, v = tensors()
    assert key(None, k, v) is None and key(q, k.to("meta"), v) is None
    assert key(q, k, torch.nested.nested_tensor([v[0]])) is None
    assert key(q, k, v, lengths=(True, 0, None)) is None and key(q, k, v, lengths=(6.0, 0, None)) is None
    assert key(q, k, v, numbers=(torch.tensor(0.5), None, 0.0)) is None
    assert key(q, k, v, numbers=(True, None, 0.0)) is None
    with forward_ad.dual_level():
        assert key(q, k, v) is None
    assert torch.func.vmap(lambda x: x.sum() if key(x, k, v) is None else x.prod())(torch.ones(2, *SHAPE)).sum() == 192


def test_wrong_calls_are_refused_after_right_ones():
    cp = df.ContextParallel(Alone())
    q, k, v = tensors()
    df.attention(q, k, v, mask=CAUSAL, cp=cp, seq_len=6, scale=1.0)
    for keywords, words in (
        (dict(seq_len=7), "local tokens"),
        (dict(seq_len=6.0), "seq_len"),
        (dict(scale=True), "scale"),
        (dict(scale=1.0, dropout_p=0.5), "dropout_seed"),
        (dict(scale=1.0, causal=True), "causal"),
    ):
        with pytest.raises(ValueError, match=words):
            df.attention(q, k, v, mask=CAUSAL, cp=cp, **{"seq_len": 6} | keywords)
    with pytest.raises(ValueError, match="dtype"):
        df.attention(q, k.double(), v, mask=CAUSAL, cp=cp, seq_len=6, scale=1.0)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="tangent"):
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        df.attention(dual, k, v, mask=CAUSAL, cp=cp, seq_len=6, scale=1.0)


def test_refused_calls_are_not_remembered():
    cp = df.ContextParallel(Alone())
    for _ in range(2):
        with pytest.raises(ValueError, match="local tokens"):
            df.attention(*tensors(), mask=CAUSAL, cp=cp, seq_len=7)
    assert not cp.repeats


def test_a_tensor_that_has_left_its_transform_is_attended_to():
    kept = []
    torch.func.grad(lambda x: kept.append(x) or x.sum())(tensors()[0])
    _, k, v = tensors(requires_grad=True)
    out = df.attention(kept[0], k, v)
    torch.testing.assert_close(out, df.attention(tensors()[0], k, v))


def test_each_layout_has_calls_of_its_own_and_few_are_kept():
    cp = df.ContextParallel(Alone())
    for group in (cp, cp.with_layout(df.Contiguous()), cp):
        df.attention(*tensors(), mask=CAUSAL, cp=group)
    assert len(cp.repeats) == 2
    batches = []  # of one group, each with a layout that is kept
    for n in range(1, 41):
        mask = CAUSAL & df.Documents([0, n % 5 + 1, 6])
        batches.append(cp.with_layout(df.Balanced(mask, chunk=n)))
        df.attention(*tensors(), mask=mask, cp=batches[-1])
        assert len(cp.repeats) <= 16 and batches[-1].repeats is cp.repeats


def test_gradients_and_results_of_repeated_calls():
    cp = df.ContextParallel(Alone())
    for _ in range(3):
        q, k, v = tensors(requires_grad=True, dtype=torch.float64)
        out, lse, largest = df.attention(q, k, v, mask=CAUSAL, cp=cp, return_lse=True, return_max_logits=True)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        )
        torch.testing.assert_close(out, expected.transpose(1, 2))
        found = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
        wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
        torch.testing.assert_close(found, wanted)
        assert lse.shape == (1, 2, 6) and largest.shape == (2,) and not largest.requires_grad
    assert len(cp.repeats) == 1
