import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.transport import Simulator
from tests import strided
from tests.random_calls import Dealt
from tests.strategies import layouts


def run(world_size, work, *layout):
    return Simulator(world_size).run(lambda transport: work(df.ContextParallel(transport, *layout)))


@given(layouts, st.integers(0, 40), st.integers(1, 8), st.integers(-3, 2))
def test_unshard_inverts_shard(layout, seq_len, world_size, dim):
    shape = [2, 3, 4]
    shape[dim] = seq_len
    x = torch.randn(shape)

    def work(cp):
        mine = cp.shard(x, dim)
        assert torch.equal(mine, x.index_select(dim, cp.positions(seq_len)))
        assert mine.shape[dim] == cp.seq_local(seq_len)
        return cp.unshard(mine, dim)

    assert all(torch.equal(whole, x) for whole in run(world_size, work, layout))


def test_a_view_that_negates_is_sent_as_what_it_stands_for():
    x, asked = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)

    def work(cp):
        mine = cp.shard(x).requires_grad_()
        whole = cp.unshard(strided.negated(mine))
        whole.backward(strided.negated(asked))
        return whole.detach(), cp.shard(2 * asked) - mine.grad

    for whole, difference in run(2, work):
        assert torch.equal(whole, x) and not difference.any()


def test_a_layout_may_give_a_rank_no_range_at_all():
    x = torch.randn(2, 5, 3)
    shards = run(3, lambda cp: (cp.shard(x), cp.unshard(cp.shard(x))), Dealt(ends=(2, 5), owners=(2, 0)))
    assert [shard.shape[1] for shard, _ in shards] == [3, 0, 2]
    assert all(torch.equal(whole, x) for _, whole in shards)


@given(layouts, st.integers(1, 40), st.integers(1, 8))
def test_gradients_of_shard_and_unshard(layout, seq_len, world_size):
    """Of the sum of all ranks' losses: unshard sums what every rank asks of the whole, shard scatters."""
    x = torch.randn(2, seq_len, dtype=torch.float64)
    weights = torch.randn(world_size, 2, seq_len, dtype=torch.float64)

    def work(cp):
        leaf = x.clone().requires_grad_()
        mine = cp.shard(leaf)
        mine.retain_grad()
        (cp.unshard(mine) * weights[cp.rank]).sum().backward()
        return mine.grad, leaf.grad, cp.positions(seq_len)

    total = weights.sum(0)
    for of_shard, of_whole, positions in run(world_size, work, layout):
        torch.testing.assert_close(of_shard, total[:, positions], rtol=1e-12, atol=1e-12)
        expected = torch.zeros_like(total).index_copy(1, positions, total[:, positions])
        torch.testing.assert_close(of_whole, expected, rtol=1e-12, atol=1e-12)


def test_shard_copies():
    """What is done to a shard in place is not done to the whole."""
    x = torch.zeros(1, 8)
    run(1, lambda cp: cp.shard(x).add_(1))
    assert (x == 0).all()


def test_slices_of_another_layout_are_refused_on_every_rank():
    def work(cp):
        with pytest.raises(ValueError, match=r"x: ranks hold \[2, 4\] along dimension 1, but Zigzag\(\) gives them"):
            cp.unshard(torch.zeros(1, 2 + 2 * cp.rank))

    run(2, work)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("counts", [[5], [3, 0, 8, 1], [0, 0]], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_mean_and_its_gradient(counts, reduction, as_tensor):
    losses = [torch.rand(n, dtype=torch.float64) for n in counts]
    tokens = sum(counts)

    def work(cp):
        mine = losses[cp.rank].clone().requires_grad_()
        count = torch.tensor(len(mine)) if as_tensor else len(mine)
        mean = cp.mean(mine.sum(), count, reduction=reduction)
        mean.backward()
        return mean.detach(), mine.grad

    expected = torch.cat(losses).mean() if tokens else torch.tensor(0.0, dtype=torch.float64)
    # Summed or averaged over the ranks afterwards, gradients must come out as those of the mean.
    share = (len(counts) if reduction == "mean" else 1) / max(tokens, 1)
    for mean, grad in run(len(counts), work):
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, torch.full_like(grad, share), rtol=1e-12, atol=1e-12)


def test_mean_keeps_the_digits_of_many_losses():
    """Sums of float32 over ranks are added in float64."""
    sums = [2.0**24, 1.0, 1.0]

    def work(cp):
        return cp.mean(torch.tensor(sums[cp.rank]), 1, reduction="sum")

    assert all(mean == torch.tensor((2.0**24 + 2) / 3) and mean.dtype == torch.float32 for mean in run(3, work))


def test_the_second_derivative_of_unshard():
    """Its backward pass is a collective, too: of the sum of all ranks' losses."""
    x = torch.randn(2, 5, dtype=torch.float64)

    def work(cp):
        mine = cp.shard(x).requires_grad_()
        (first,) = torch.autograd.grad(cp.unshard(mine).pow(3).sum(), mine, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), mine)
        return first.detach(), second, cp.shard(x)

    for first, second, mine in run(3, work):
        torch.testing.assert_close(first, 3 * 3 * mine**2, rtol=1e-12, atol=1e-12)
        # The first is 9 x^2, its square 81 x^4.
        torch.testing.assert_close(second, 4 * 81 * mine**3, rtol=1e-12, atol=1e-12)


def test_forward_mode_is_refused_by_torch():
    cp = df.ContextParallel(df.transport.Alone())
    for function in (cp.unshard, lambda x: cp.mean(x.sum(), 1, reduction="sum")):
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(function, (torch.ones(1, 3),), (torch.ones(1, 3),))


def test_a_count_of_nan_is_never_a_loss_of_zero():
    """On CPUs ranks look at it and raise; where that would be slow, the loss is NaN."""

    nan = torch.tensor(torch.nan)
    with pytest.raises(
        ValueError, match="token_count: a rank refused its arguments and raised the reason, or has counted"
    ):
        run(2, lambda cp: cp.mean(torch.zeros(()), nan if cp.rank else 3, reduction="mean"))
    assert df.ContextParallel(df.transport.Alone()).mean(torch.zeros(()), nan, reduction="mean").isnan()


def test_a_rank_whose_slice_is_none_stops_the_others():
    def work(cp):
        words = "x: expected a tensor, got list" if cp.rank else "rank 1 refused this call"
        with pytest.raises(ValueError, match=words):
            cp.unshard([1] if cp.rank else torch.zeros(1, 4))
        assert cp.unshard(torch.zeros(1, 4)).shape == (1, 8)

    run(2, work)
