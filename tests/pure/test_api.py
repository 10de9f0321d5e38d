import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.transport import Alone, Simulator
from tests.strategies import layouts


def zeros(tokens, **options):
    return [torch.zeros(1, tokens, 2, 8, **options) for _ in range(3)]


@given(layouts, st.integers(0, 40), st.integers(1, 8))
def test_positions(layout, seq_len, world_size):
    def work(transport):
        cp = df.ContextParallel(transport, layout)
        positions = cp.positions(seq_len)
        assert positions.dtype == torch.int64 and len(positions) == cp.seq_local(seq_len)
        assert (cp.rank, cp.world_size) == (transport.rank, world_size)
        return positions

    positions = Simulator(world_size).run(work)
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(seq_len))


@pytest.mark.parametrize("seq_len", [-1, 2.0, "8", True])
def test_positions_refuse(seq_len):
    with pytest.raises(ValueError, match="seq_len: expected the global length, an int of at least 0"):
        df.ContextParallel(Alone()).positions(seq_len)


def test_positions_go_where_they_are_asked():
    assert df.ContextParallel(Alone()).positions(3, device="meta").device.type == "meta"


def test_seq_len_may_be_left_out_where_all_ranks_hold_equally_many():
    def work(transport):
        cp = df.ContextParallel(transport, df.Striped())
        return df.attention(*zeros(4), cp=cp)

    assert [out.shape for out in Simulator(3).run(work)] == [(1, 4, 2, 8)] * 3


def test_seq_len_may_be_left_out_where_the_mask_knows_it():
    def work(transport):
        cp = df.ContextParallel(transport, df.Striped())
        mask = df.Causal() & df.Documents([0, 2, 11])
        return df.attention(*zeros(cp.seq_local(11)), mask=mask, cp=cp)

    assert [out.shape[1] for out in Simulator(3).run(work)] == [4, 4, 3]


def test_uneven_shards_must_say_seq_len():
    def work(transport):
        cp = df.ContextParallel(transport, df.Striped())
        q, k, v = zeros(cp.seq_local(11))
        with pytest.raises(ValueError, match="seq_len is 12 on rank 0, 12 on rank 1, 9 on rank 2"):
            df.attention(q, k, v, cp=cp)
        return df.attention(q, k, v, cp=cp, seq_len=11)

    assert [out.shape[1] for out in Simulator(3).run(work)] == [4, 4, 3]


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
     (torch.float64, torch.float64)],
)  # fmt: skip
def test_what_comes_back(dtype, lse_dtype):
    q, k, v = zeros(5, dtype=dtype)
    v = v[..., :3]
    out = df.attention(q, k, v)
    assert out.shape == (1, 5, 2, 3) and out.dtype == dtype
    out, lse = df.attention(q, k, v, return_lse=True)
    assert lse.shape == (1, 2, 5) and lse.dtype == lse_dtype
    torch.testing.assert_close(lse, torch.full_like(lse, 5.0).log())


def test_lse_is_differentiable_alone():
    q, k, v = (torch.randn_like(t, dtype=torch.float64).requires_grad_() for t in zeros(5))
    _, lse = df.attention(q, k, v, return_lse=True)
    lse.sum().backward()
    expected = torch.einsum("bihd,bjhd->bhij", q, k).mul(8**-0.5).logsumexp(-1).sum()
    for got, want in zip((q.grad, k.grad), torch.autograd.grad(expected, (q, k)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (v.grad == 0).all()


def test_softcap_of_none_and_of_zero_are_none():
    q, k, v = (torch.randn_like(t) for t in zeros(5))
    outs = [df.attention(q, k, v, softcap=softcap) for softcap in (None, 0, 0.0)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_nothing_to_differentiate_is_no_error():
    q, k, v = zeros(5)
    with torch.no_grad():
        assert not df.attention(q.requires_grad_(), k, v).requires_grad
    df.attention(q, k, v).sum().backward()  # k and v want no gradient
    assert q.grad is not None and k.grad is None


def test_two_calls_in_flight_keep_their_own_options():
    """Backward comes after both forwards, and each must find its own mask again."""
    q, k, v = (torch.randn_like(t, dtype=torch.float64) for t in zeros(6))

    def gradient(mask, others):
        leaf = q.clone().requires_grad_()
        out = df.attention(leaf, k, v, mask=mask)
        for other in others:
            df.attention(q, k, v, mask=other)
        out.sum().backward()
        return leaf.grad

    others = [df.Chunked(n) for n in range(1, 40)]  # more than plans are kept
    assert torch.equal(gradient(df.Causal(), others), gradient(df.Causal(), []))


def test_backward_outlives_its_context_parallel():
    q, k, v = (t.requires_grad_() for t in zeros(4))
    cp = df.ContextParallel(Alone())
    out = df.attention(q, k, v, cp=cp)
    del cp
    out.sum().backward()
    assert q.grad is not None


def modules_with(cp):
    """Whatever holds a group: by itself, in a module, and deeper."""
    module = df.nn.SelfAttention(8, 2, cp=cp)
    return [cp, module, torch.nn.Sequential(module)]


def test_copies_share_the_group():
    def work(transport):
        cp = df.ContextParallel(transport)
        assert copy.copy(cp) is cp
        for held in modules_with(cp):
            assert {type(held), type(copy.deepcopy(held))} == {type(held)}
        module = modules_with(cp)[1]
        averaged = torch.optim.swa_utils.AveragedModel(module)
        assert averaged.module is not module and averaged.module.cp is cp
        assert averaged.module.q_proj.weight is not module.q_proj.weight
        x = torch.randn(1, 4, 8)
        assert torch.equal(averaged(x), module(x))

    Simulator(2).run(work)


@pytest.mark.parametrize("save", [pickle.dumps, lambda x: torch.save(x, io.BytesIO())], ids=["pickle", "torch.save"])
def test_pickling_is_refused_in_words(save):
    for held in modules_with(df.ContextParallel(Alone())):
        with pytest.raises(TypeError, match=r"a ContextParallel cannot be pickled.* Save module\.state_dict\(\)"):
            save(held)
    module = modules_with(df.ContextParallel(Alone()))[1]
    torch.save(module.state_dict(), io.BytesIO())


def test_plans_are_kept():
    cp = df.ContextParallel(Alone())
    assert cp.plan(df.Causal(), 8) is cp.plan(df.Causal(), 8)
    assert cp.plan(df.Causal(), 8) is not cp.plan(df.Causal(), 9)
    with pytest.raises(ValueError, match="mask: expected a Mask"):
        cp.plan("causal", 8)


def test_repr_says_what_it_is():
    cp = df.ContextParallel(Alone(), df.Striped())
    assert repr(cp) == "ContextParallel(rank 0 of 1, layout=Striped(), schedule=Ring(), kernel=None)"
