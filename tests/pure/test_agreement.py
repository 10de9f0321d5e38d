"""Ranks that disagree are told so on every rank, by field and rank, and nobody waits."""

import pytest
import torch

import distflash as df
from distflash.agreement import Agreement
from distflash.transport import Simulator

S, W = 16, 4


def call(transport, **changes):
    """The same good call on every rank, but for the changes."""
    options = dict(batch=1, heads=2, kv_heads=2, d_qk=8, d_v=8, dtype=torch.float32, layout=df.Zigzag(), tokens=S // W)
    options |= changes
    shapes = {"q": ("heads", "d_qk"), "k": ("kv_heads", "d_qk"), "v": ("kv_heads", "d_v")}
    q, k, v = (
        torch.zeros(options["batch"], options["tokens"], options[h], options[d], dtype=options["dtype"])
        for h, d in shapes.values()
    )
    cp = df.ContextParallel(transport, options["layout"], kernel=df.kernels.Reference())
    known = ("batch", "heads", "kv_heads", "d_qk", "d_v", "dtype", "layout", "tokens")
    return df.attention(q, k, v, cp=cp, **{n: value for n, value in options.items() if n not in known})


def messages(work):
    """What each rank's ValueError says."""

    def caught(transport):
        with pytest.raises(ValueError) as error:
            work(transport)
        return str(error.value)

    simulator = Simulator(W)
    texts = simulator.run(caught)
    assert simulator.traffic.messages == 0
    return texts


DISAGREEMENTS = {
    "batch": (dict(batch=2), "batch is 1 on rank 0, 1 on rank 1, 2 on rank 2, 1 on rank 3"),
    "heads": (dict(heads=4), "heads is 2 on rank 0, 2 on rank 1, 4 on rank 2"),
    "kv_heads": (dict(kv_heads=1), "kv_heads is 2 on rank 0, 2 on rank 1, 1 on rank 2"),
    "head_dim": (dict(d_qk=16), "head_dim is 8 on rank 0, 8 on rank 1, 16 on rank 2"),
    "value head_dim": (dict(d_v=4), "value head_dim is 8 on rank 0, 8 on rank 1, 4 on rank 2"),
    "dtype": (dict(dtype=torch.bfloat16), "dtype differs between ranks 0, 1, 3 and rank 2"),
    "seq_len": (dict(tokens=5), "seq_len is 16 on rank 0, 16 on rank 1, 20 on rank 2"),
    "mask": (dict(mask=df.Causal()), "mask differs between ranks 0, 1, 3 and rank 2"),
    "layout": (dict(layout=df.Striped()), "layout differs between ranks 0, 1, 3 and rank 2"),
    "scale": (dict(scale=0.5), "scale differs between ranks 0, 1, 3 and rank 2"),
    "softcap": (dict(softcap=5.0), "softcap differs between ranks 0, 1, 3 and rank 2"),
    "sinks": (dict(sinks=torch.zeros(2)), "sinks is 0 on rank 0, 0 on rank 1, 1 on rank 2"),
    "alibi_slopes": (dict(alibi_slopes=torch.zeros(2)), "alibi_slopes is 0 on rank 0, 0 on rank 1, 1 on rank 2"),
}


@pytest.mark.parametrize(("changes", "words"), DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys())
def test_a_disagreement_is_named_on_every_rank(changes, words):
    for rank, text in enumerate(messages(lambda t: call(t, **changes if t.rank == 2 else {}))):
        assert words in text
        assert f"This is rank {rank}." in text


def test_all_differences_are_named_at_once():
    changes = dict(mask=df.Causal(), dtype=torch.bfloat16)
    for text in messages(lambda t: call(t, **changes if t.rank == 0 else {})):
        assert "dtype differs between rank 0 and ranks 1, 2, 3" in text
        assert "mask differs between rank 0 and ranks 1, 2, 3" in text


def test_long_masks_are_told_apart():
    """By all of their numbers, not by those that an error message has room for."""
    ends = list(range(0, 4001, 2))
    other = [*ends[:1000], ends[1000] + 1, *ends[1001:]]

    def work(transport):
        mask = df.Documents(other if transport.rank == 1 else ends)
        call(transport, mask=mask, tokens=1000)

    for text in messages(work):
        assert "mask differs between ranks 0, 2, 3 and rank 1" in text
        assert len(text) < 500


@pytest.mark.parametrize(
    "bad", [dict(sinks=torch.zeros(3)), dict(tokens=5, seq_len=S), dict(dropout_p=0.5), dict(mask="causal")], ids=str
)
def test_a_rank_that_refuses_its_own_arguments_stops_the_others(bad):
    texts = messages(lambda t: call(t, **bad if t.rank == 1 else {}))
    assert "refused" not in texts[1]
    assert all("rank 1 refused this call because of its own arguments" in texts[rank] for rank in (0, 2, 3))


def test_ranks_that_all_refuse_say_each_their_own():
    texts = messages(lambda t: call(t, softcap=-1.0 - t.rank))
    assert all(f"got {-1.0 - rank}" in text for rank, text in enumerate(texts))


def test_a_call_after_a_disagreement_is_a_fresh_start():
    def work(transport):
        agreement = Agreement(transport)
        with pytest.raises(ValueError, match="n is 0 on rank 0, 1 on rank 1"):
            agreement.require((("n", transport.rank),))
        agreement.require((("n", 5),))

    Simulator(2).run(work)


class Counting:
    """A transport of two that only answers, as if both ranks said the same, and counts."""

    rank, world_size = 0, 2

    def __init__(self, checks_every_call):
        self.checks_every_call, self.asked = checks_every_call, 0

    def gather_ints(self, values):
        self.asked += 1
        return [list(values)] * 2


@pytest.mark.parametrize(("checks_every_call", "expected"), [(False, 2), (True, 4)])
def test_a_known_signature_is_not_compared_again_where_that_is_dear(checks_every_call, expected):
    transport = Counting(checks_every_call)
    agreement = Agreement(transport)
    for n in (1, 1, 2, 1):
        agreement.require((("n", n), ("mask", df.Causal())))
    assert transport.asked == expected


def test_one_rank_asks_nobody():
    transport = Counting(True)
    transport.world_size = 1
    Agreement(transport).require((("n", 1),))
    Agreement(transport).refuse(1)
    assert transport.asked == 0


class Counted:
    """A transport on which all ranks say the same, and which counts how often they are asked."""

    rank, world_size, checks_every_call = 0, 2, False

    def __init__(self):
        self.asked = 0

    def gather_ints(self, values):
        self.asked += 1
        return [list(values)] * 2


def test_what_is_remembered_is_bounded():
    transport = Counted()
    agreement = Agreement(transport)
    for n in range(3000):  # documents that are new in every step
        agreement.require((("seq_len", n),))
        agreement.require((("seq_len", n),))
    assert transport.asked == 3000
    assert len(agreement._known) <= 1024


class Plain:
    """Neither a dataclass nor with a repr of its own: that would be its address."""


def test_objects_without_a_repr_agree_by_their_class():
    codes = []
    for value in (Plain(), Plain(), Counted()):
        transport = Counted()
        transport.gather_ints = lambda values: codes.append(values[1]) or [list(values)] * 2
        Agreement(transport).require((("schedule", value),))
    assert codes[0] == codes[1] != codes[2]
