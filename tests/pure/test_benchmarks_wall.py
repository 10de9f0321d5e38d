"""The benchmark of wall time: loops of layers, blocks, all-to-all, and ratios."""

import pytest
import torch

import distflash as df
from benchmarks import common, wall
from benchmarks.comparison import BOTH, FORWARD, Candidate, ours
from benchmarks.layers import AttentionLayers, Blocks, DecoderBlock, Sizes, calls_of, rotated, rotations
from benchmarks.stopwatch import Stopwatch, Times

ALONE = df.ContextParallel(df.transport.Alone())
CPU = torch.device("cpu")
SIZES = Sizes(hidden=32, heads=4, kv_heads=2, head_dim=16, mlp=48)
S = 24


def dense(q, k, v, mask):
    """Heads first, as many key heads as query heads."""
    positions = torch.arange(q.shape[2])
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask.materialize(positions, positions), -torch.inf)
    return s.softmax(-1) @ v


PLAIN = Candidate(dense, heads_first=True, repeat_heads=True)


def test_layers_are_the_same_whoever_attends():
    inputs = common.random_inputs(SIZES.attention(S), S, torch.float64, CPU)
    made, expected = (AttentionLayers(who, inputs, df.Causal(), layers=3) for who in (ours(ALONE, S), PLAIN))
    torch.testing.assert_close(made.forward(), expected.forward().transpose(1, 2))
    grads, others = made.step(), expected.step()
    assert len(grads) == 1 + 2 * 3
    torch.testing.assert_close(grads[0], others[0].transpose(1, 2))
    for grad, other in zip(grads[1:], others[1:], strict=True):
        torch.testing.assert_close(grad, other.transpose(1, 2).unflatten(2, (2, 2)).sum(3))


def test_blocks_are_the_same_whoever_attends():
    def made(candidate):
        torch.manual_seed(0)
        attend = candidate.on_tokens(df.Causal())
        modules = [DecoderBlock(SIZES, attend, torch.float64, CPU) for _ in range(2)]
        return Blocks(modules, SIZES, torch.arange(S), torch.float64)

    one, other = made(ours(ALONE, S)), made(PLAIN)
    torch.testing.assert_close(one.forward(), other.forward())
    grads = one.step()
    assert len(grads) == 1 + 2 * 6
    for grad, expected in zip(grads, other.step(), strict=True):
        torch.testing.assert_close(grad, expected)


def test_rotations_turn_scores_into_those_of_distances():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64, generator=generator) for _ in range(2))

    def score(i, j):
        at = [rotations(torch.tensor([n]), 16, torch.float64) for n in (i, j)]
        return (rotated(q, *at[0]) * rotated(k, *at[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-5, atol=1e-5)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3


def test_a_forward_alone_keeps_nothing_for_a_backward():
    inputs = common.random_inputs(SIZES.attention(S), S, torch.float64, CPU)
    calls = calls_of(AttentionLayers(ours(ALONE, S), inputs, df.Causal(), layers=1))
    assert not calls[FORWARD]().requires_grad and len(calls[BOTH]()) == 3


def test_a_stopwatch_takes_medians_of_several_samples():
    ran = []
    times = Stopwatch(CPU, seconds=0.0).medians({"one": lambda: ran.append(1), "two": lambda: ran.append(2)})
    assert ran == [1, 2] * 4  # one to guess, three that count, in turns
    for taken in times.values():
        assert taken.repeats == 3 and 0 < taken.host <= taken.wall and taken.device is None


def test_times_are_of_one_layer():
    assert wall.per_layer(Times(8.0, 4.0, 2.0, 5), 4) == Times(2.0, 1.0, 0.5, 5)
    assert wall.per_layer(Times(8.0, 4.0, None, 5), 4) == Times(2.0, 1.0, None, 5)


def test_ratios_are_over_ours_of_the_same_pass():
    times = {"distflash|forward": 2.0, "peer|forward": 3.0, "peer|backward": 1.0, "distflash, graph|forward": 1.0}
    assert wall.ratios(times) == {
        "distflash|forward": 1.0,
        "peer|forward": 1.5,
        "distflash, graph|forward": 0.5,
    }


@pytest.mark.parametrize("what", [wall.LAYERS, wall.BLOCK])
def test_a_row_names_who_is_missing(what, tmp_path):
    small = "--device cpu --seconds 0.001 --dtype float32 --who ours graph peers --layers 2 --blocks 1 --hidden 32"
    options = wall.options_of([*small.split(), "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--mlp", "48"])
    row = wall.Bench(options, CPU).row(what, S)
    assert set(row["times"]) == {"distflash|forward", f"distflash|{BOTH}"}
    assert {"SDPA cuDNN", "flash-attn-4"} <= set(row["left_out"])
    assert row["left_out"]["distflash, graph|forward"] == "CUDA graphs need a GPU"
    wall.report(what, row)
    common.save("wall", tmp_path, {"what": what, "rows": [row]}, wall.draw)
    assert {path.name for path in tmp_path.iterdir()} == {"wall.json", "wall.png"}
