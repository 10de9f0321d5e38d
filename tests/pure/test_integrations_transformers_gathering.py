"""Gathered layers: which ones, their arguments, and errors."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import distflash as df
from distflash.integrations import transformers as tf
from distflash.transport import Alone, Simulator
from tests.tiny_models import CONFIGS_OF_HYBRIDS, Case


@pytest.fixture
def cp():
    cp = df.ContextParallel(Alone())
    tf.register(cp)
    yield cp
    tf.unregister()


class Sum(nn.Module):
    """A mixer: the running sum of a sequence's sines, and of its position ids. Notes what it was called with."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def forward(self, hidden_states, attention_mask, position_ids, cache_params=None, **others):
        assert attention_mask is None
        self.lengths.append(hidden_states.shape[1])
        return hidden_states.sin().cumsum(1) + position_ids[..., None].cumsum(1), None


class Block(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x, **kwargs):
        return self.mixer(x, attention_mask=torch.ones(x.shape[:2]), **kwargs)[0]


def whole_sums(x, cu_seqlens):
    parts = x.split([b - a for a, b in pairwise(cu_seqlens)], 1)
    return torch.cat([p.sin().cumsum(1) + torch.arange(p.shape[1])[:, None].cumsum(0) for p in parts], 1)


@pytest.mark.parametrize("layout", [df.Zigzag(), df.Contiguous(), df.Striped()], ids=repr)
@pytest.mark.parametrize("cu_seqlens", [(0, 13), (0, 1, 5, 13), (0, 12, 13)], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_document_is_run_whole_and_by_itself(layout, cu_seqlens, world_size):
    ids = torch.arange(13)[None]
    x = torch.randn(1, 13, 2, dtype=torch.float64)

    def work(transport):
        cp = df.ContextParallel(transport, layout)
        part = tf.shard_batch({"input_ids": ids, "cu_seqlens": torch.tensor(cu_seqlens)}, cp)
        block = Block(Sum())
        tf.gather_layers(block, cp, classes=[Sum])
        out = block(cp.shard(x), position_ids=part["position_ids"], distflash=part["distflash"])
        return cp.unshard(out), block.mixer.lengths, cp.positions(13)

    for out, lengths, positions in Simulator(world_size).run(work):
        assert torch.equal(out, whole_sums(x, cu_seqlens))
        # Documents that a rank has no token of are not run there.
        ends = [*pairwise(cu_seqlens)]
        assert lengths == [b - a for a, b in ends if ((positions >= a) & (positions < b)).any()]


def test_a_family_that_is_not_known_is_refused_unless_classes_are_named(cp):
    model = Case("llama").model("distflash")
    with pytest.raises(ValueError, match=r"model: LlamaForCausalLM, of type llama, is not among .* Name the classes"):
        tf.gather_layers(model, cp)
    assert tf.gather_layers(model, cp, classes=["LlamaMLP"]).names == ("model.layers.0.mlp", "model.layers.1.mlp")


REFUSED = r"gather_layers\(model, cp\)|no position_ids|no layer of the model has used|registry of attentions"


@pytest.mark.parametrize("family", CONFIGS_OF_HYBRIDS)
def test_families_of_the_table_are_refused_before_and_run_after(family, cp):
    model, part = Case(family).model("distflash"), tf.shard_batch(Case(family).inputs(), cp)
    with pytest.raises(ValueError, match=REFUSED):
        model(**part)
    layers = tf.gather_layers(model, cp)
    with pytest.raises(ValueError, match="model: its layers are gathered already"):
        tf.gather_layers(model, cp)
    model(**tf.shard_batch(Case(family).inputs(), cp))
    layers.remove()
    with pytest.raises(ValueError, match=REFUSED):
        model(**tf.shard_batch(Case(family).inputs(), cp))


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("Sum", "classes: expected classes of layers, or their names, in a list, got 'Sum'"),
        ([], r"classes: expected classes of layers, or their names, in a list, got \[\]"),
        ([Sum, "Product"], "classes: Block has no layer of class Product"),
    ],
    ids=str,
)
def test_wrong_classes(classes, words, cp):
    with pytest.raises(ValueError, match=words):
        tf.gather_layers(Block(Sum()), cp, classes)


def test_what_is_no_group_is_refused():
    with pytest.raises(ValueError, match="cp: expected the ContextParallel that register was given, got int"):
        tf.gather_layers(Block(Sum()), 3, [Sum])


def test_a_mixer_of_the_table_that_is_not_named_is_refused(cp):
    model = Case("rwkv").model("distflash")
    words = "classes: RwkvForCausalLM mixes tokens by RwkvFeedForward too"
    with pytest.raises(ValueError, match=words):
        tf.gather_layers(model, cp, classes=["RwkvSelfAttention"])
    layers = tf.gather_layers(model, cp, classes=["RwkvBlock"])  # which holds both
    assert layers.names == ("rwkv.blocks.0", "rwkv.blocks.1")


class Dropping(Sum):
    def __init__(self):
        super().__init__()
        self.inner, self.attention_dropout = nn.Sequential(nn.Dropout(0.0)), 0


@pytest.mark.parametrize("split", [False, True], ids=["gathered", "split"])
def test_dropout_is_refused_in_training(split, cp):
    part = tf.shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.long)}, cp)
    if split:
        model = Case("mamba2").model("distflash")
        tf.gather_layers(model, cp, split_heads=True)
        model.backbone.layers[0].mixer.inner = nn.Dropout(0.5)
        words = r"dropout: Mamba2Mixer has dropout \(inner.p = 0.5\)"
    else:
        model = Block(Dropping())
        part = {"x": torch.ones(1, 4, 2), "position_ids": part["position_ids"], "distflash": part["distflash"]}
        tf.gather_layers(model, cp, [Dropping])
        model(**part)
        model.mixer.attention_dropout = 0.1
        words = r"dropout: Dropping has dropout \(Dropping.attention_dropout = 0.1\)"
    model.eval()(**part)
    with pytest.raises(ValueError, match=words):
        model.train()(**part)


def test_a_layer_whose_first_result_is_not_one_a_token_is_refused(cp):
    class Last(Sum):
        def forward(self, hidden_states, attention_mask, position_ids, **others):
            return hidden_states[:, -1:], None

    block = Block(Last())
    tf.gather_layers(block, cp, [Last])
    shard = tf.shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.long)}, cp)["distflash"]
    with pytest.raises(ValueError, match="classes: Last returns no result for each token first"):
        block(torch.ones(1, 4, 2), position_ids=torch.arange(4)[None], distflash=shard)


CALLS = [
    ({}, "batch: nothing that shard_batch adds has reached the layers"),
    ({"distflash": True, "cache_params": object()}, "past_key_values: Sum cannot go on from a cache"),
    ({"distflash": True, "gates": (torch.ones(1),)}, "gates: Sum is given a tensor that gather_layers does not know"),
    ({"distflash": True, "x": torch.ones(1, 5, 2)}, r"hidden_states: Sum was called with \[1, 5, 2\], expected"),
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[words[:20] for _, words in CALLS])
def test_calls_that_are_refused(call, words, cp):
    shard = tf.shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.long)}, cp)["distflash"]
    block = Block(Sum())
    tf.gather_layers(block, cp, [Sum])
    call = {"x": torch.ones(1, 4, 2), "position_ids": torch.arange(4)[None], **call}
    if "distflash" in call:
        call["distflash"] = shard
    with pytest.raises(ValueError, match=words):
        block(**call)


def test_a_forward_that_raises_leaves_nothing_behind(cp):
    """The next call without a batch is refused, not run with the batch of the one before."""
    shard = tf.shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.long)}, cp)["distflash"]
    block = Block(Sum())
    tf.gather_layers(block, cp, [Sum])
    for _ in range(2):
        with pytest.raises(ValueError, match="hidden_states"):
            block(torch.ones(1, 5, 2), position_ids=torch.arange(5)[None], distflash=shard)
    with pytest.raises(ValueError, match="batch: nothing"):
        block(torch.ones(1, 4, 2), position_ids=torch.arange(4)[None])


class Checkpointed(Block):
    """Runs its mixer again for the backward pass, and passes some keywords on."""

    passes = ()

    def forward(self, x, **kwargs):
        passed = {name: kwargs[name] for name in ("position_ids", *self.passes)}

        def again(x):
            return self.mixer(x, attention_mask=None, **passed)[0]

        return checkpoint(again, x, use_reentrant=False)


def checkpointed(cp, passes):
    shard = tf.shard_batch({"input_ids": torch.ones(1, 4, dtype=torch.long)}, cp)["distflash"]
    block = Checkpointed(Sum())
    block.passes = passes
    tf.gather_layers(block, cp, [Sum])
    x = torch.ones(1, 4, 2, requires_grad=True)
    block(x, position_ids=torch.arange(4)[None], distflash=shard).sum().backward()
    return x.grad[0, :, 0]


def test_a_layer_that_runs_again_has_the_batch_that_it_is_given(cp):
    torch.testing.assert_close(checkpointed(cp, ("distflash",)), torch.tensor([4.0, 3, 2, 1]) * math.cos(1))


def test_a_layer_that_runs_again_for_nobody_knows_which_batch_is_refused(cp):
    with pytest.raises(ValueError, match="activation checkpointing runs them again for a backward pass"):
        checkpointed(cp, ())
