"""Megatron's GPT over real ranks: losses and gradient norms equal those of its own attention on one process."""

from importlib.util import find_spec

import pytest

from tests.hosts.runs import MegatronRun, call

pytestmark = [
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed: bash .ci/hosts"),
    pytest.mark.timeout(300),
]
PRELOAD = "tests.hosts.megatron_runs"

RUNS = {
    "causal": {},
    "window and learned sinks": {"options": (("window_size", (5, 0)), ("softmax_type", "learnable"))},
    "off by one": {"options": (("softmax_type", "off-by-one"), ("apply_query_key_layer_scaling", True))},
    "packed": {"documents": (8, 16, 4)},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_as_on_one_process(name, ranks_of):
    (exact,) = ranks_of(1).run(call, PRELOAD, "train", MegatronRun(**RUNS[name]), False)
    for found in ranks_of(2).run(call, PRELOAD, "train", MegatronRun(context=2, **RUNS[name]), True):
        for what, values in exact.items():
            assert found[what] == pytest.approx(values, rel=1e-5), what


def ask(ranks_of, function, *args):
    return ranks_of(1).run(call, "tests.hosts.megatron_refusals", function, *args)[0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            "of_layers",
            {
                "ranks": "context_parallel_size: is 2",
                "layout": "Zigzag()",
                "cross": 'expected "self"',
                "dropout": "got 0.1",
                "comm": "schedule",
                "logits": "turn both off",
            },
        ),
        (
            "of_calls",
            {
                "bias": "attention_bias",
                "mask": "packed_seq_params",
                "kind": "attn_mask_type",
                "cache": "1 and 4 tokens",
            },
        ),
        (
            "of_packed",
            {"format": '"thd"', "group": "hybrid", "keys": "other boundaries", "lengths": "a multiple of twice"},
        ),
    ],
)
def test_what_is_refused(function, words, ranks_of):
    found = ask(ranks_of, function)
    assert found.pop("nothing") is None
    assert found.keys() == words.keys()
    for name, problem in found.items():
        assert words[name] in (problem or ""), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_document_is_in_a_zigzag_of_its_own(world_size, ranks_of):
    lengths = [2 * world_size * n for n in (1, 3, 2)]
    assert ask(ranks_of, "layout_agrees", lengths, world_size)
