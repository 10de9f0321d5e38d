"""Layers with split heads: the original stays unchanged, and uneven heads are gathered."""

import pytest
import torch

import distflash as df
from distflash.integrations import transformers as tf
from distflash.integrations.transformers.split_heads import copy_with, kind_of
from distflash.transport import Alone, Simulator
from tests.tiny_models import Case, eager, relative


@pytest.fixture
def cp():
    cp = df.ContextParallel(Alone())
    tf.register(cp)
    yield cp
    tf.unregister()


def mixer(family):
    model = Case(family).model("eager")
    return next(module for module in model.modules() if kind_of(module, 1) is not None)


@pytest.mark.parametrize(
    ("family", "divided"),
    [("qwen3_next", (1, 2, 3, 6)), ("mamba2", (1, 2, 3, 6)), ("nemotron_h", (1, 2, 4)), ("bamba", (1, 2, 4))],
)
def test_which_numbers_of_ranks_divide_the_heads(family, divided):
    assert tuple(n for n in range(1, 9) if kind_of(mixer(family), n) is not None) == divided


def test_heads_that_share_a_group_in_part_are_not_split():
    layer = mixer("mamba2")  # 6 heads
    layer.n_groups = 3
    assert [n for n in range(1, 7) if kind_of(layer, n) is not None] == [1, 3, 6]


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "mamba2", "nemotron_h"])
def test_the_columns_of_all_ranks_are_all_that_the_scan_reads(family):
    layer = mixer(family)
    shares = [kind_of(layer, 2).share(layer, 2, rank) for rank in range(2)]
    channels = torch.cat([share.channels for share in shares])
    assert channels.unique().tolist() == list(range(layer.conv_dim))
    assert len({len(share.columns) for share in shares}) == 1


def test_a_copy_leaves_the_layer_as_it_is():
    layer = mixer("mamba2")
    names, forward = [name for name, _ in layer.named_parameters()], layer.forward
    copied = copy_with(layer, num_heads=1, D=layer.D[:1], norm=None)
    assert (copied.num_heads, copied.D.shape, copied.norm) == (1, (1,), None) and copied.A_log is layer.A_log
    assert layer.num_heads == 6 and [name for name, _ in layer.named_parameters()] == names and layer.forward == forward


def test_split_layers_are_named_and_removed_again(cp):
    model = Case("qwen3_next").model("distflash")
    layers = tf.gather_layers(model, cp, split_heads=True)
    assert layers.split == layers.names == ("model.layers.0.linear_attn",)
    inputs = Case("qwen3_next").inputs()
    got = model(**tf.shard_batch(inputs, cp)).logits
    layers.remove()
    assert "forward" not in vars(model.model.layers[0].linear_attn)
    tf.gather_layers(model, cp)
    assert relative(got, model(**tf.shard_batch(inputs, cp)).logits) <= 1e-6


def test_layers_of_other_kinds_are_gathered(cp):
    layers = tf.gather_layers(Case("jamba").model("distflash"), cp, split_heads=True)
    assert layers.split == () and len(layers.names) == 1


def test_simulated_ranks_are_one_process():
    """In one process: Mamba-2 has no attention, so that its ranks need no registry."""
    case = Case("mamba2", (1, 11, 25))

    def work(transport):
        cp = df.ContextParallel(transport)
        model = case.model("eager")
        tf.gather_layers(model, cp, split_heads=True)
        return cp.unshard(model(**tf.shard_batch(case.inputs(), cp)).logits).detach()

    for logits in Simulator(2).run(work):
        assert relative(logits, eager(case)["logits"]) <= 1e-5
