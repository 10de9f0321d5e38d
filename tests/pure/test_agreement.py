"""If ranks' calls differ, every rank raises an error that names the ranks and fields, and none waits."""

from dataclasses import dataclass

import pytest
import torch

import distflash as df
from distflash.agreement import Agreement
from distflash.transport import SimulatedTransport, Simulator
from tests.counting import Counting as CountingKernel

S, W = 16, 4
REFERENCE = df.kernels.Reference()


def call(transport, **changes):
    """The same good call on every rank, but for the changes."""
    options = dict(batch=1, heads=2, kv_heads=2, d_qk=8, d_v=8, dtype=torch.float32, layout=df.Zigzag(), tokens=S // W)
    options |= dict(kernel=REFERENCE, check_every_call=None, grad=False) | changes
    shapes = {"q": ("heads", "d_qk"), "k": ("kv_heads", "d_qk"), "v": ("kv_heads", "d_v")}
    q, k, v = (
        torch.zeros(options["batch"], options["tokens"], options[h], options[d], dtype=options["dtype"])
        for h, d in shapes.values()
    )
    q.requires_grad_(options["grad"])
    group = {name: options[name] for name in ("layout", "kernel", "check_every_call")}
    cp = df.ContextParallel(transport, **group)
    known = ("batch", "heads", "kv_heads", "d_qk", "d_v", "dtype", "tokens", "grad", *group)
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
    "sinks": (dict(sinks=torch.zeros(2)), "sinks differs between ranks 0, 1, 3 and rank 2 (here it is "),
    "alibi_slopes": (dict(alibi_slopes=torch.zeros(2)), "alibi_slopes differs between ranks 0, 1, 3 and rank 2"),
    "kernel": (dict(kernel=CountingKernel()), "kernel differs between ranks 0, 1, 3 and rank 2"),
    "grad": (dict(grad=True), "needs a gradient differs between ranks 0, 1, 3 and rank 2"),
    "check_every_call": (dict(check_every_call=False), "check_every_call differs between ranks 0, 1, 3 and rank 2"),
}


@pytest.mark.parametrize(("changes", "words"), DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys())
def test_a_disagreement_is_named_on_every_rank(changes, words):
    for rank, text in enumerate(messages(lambda t: call(t, **changes if t.rank == 2 else {}))):
        assert words in text
        assert ("pass seq_len=" in text) == words.startswith("seq_len")
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
        agreement = Agreement(transport, every_call=True)
        with pytest.raises(ValueError, match="n is 0 on rank 0, 1 on rank 1"):
            agreement.require("test", lambda: {"n": transport.rank})
        agreement.require("test", lambda: {"n": 5})

    Simulator(2).run(work)


PER_HEAD = {
    "sinks": (dict(sinks=torch.zeros(2)), dict(sinks=torch.tensor([0.0, 0.5]))),
    "dtype of sinks": (dict(sinks=torch.zeros(2)), dict(sinks=torch.zeros(2, dtype=torch.float64))),
    "alibi_slopes": (dict(alibi_slopes=torch.ones(2)), dict(alibi_slopes=torch.tensor([1.0, 2.0]))),
}


@pytest.mark.parametrize("check_every_call", [True, False])
@pytest.mark.parametrize(("common", "other"), PER_HEAD.values(), ids=PER_HEAD.keys())
def test_values_per_head_are_compared(common, other, check_every_call):
    options = dict(check_every_call=check_every_call)
    for text in messages(lambda t: call(t, **options, **other if t.rank == 2 else common)):
        assert f"the values of {next(iter(common))} differs between ranks 0, 1, 3 and rank 2" in text


class Counted:
    """A transport of two on which both ranks say the same, and which counts how often they are asked."""

    rank, world_size, verifies_every_call = 0, 2, False

    def __init__(self):
        self.asked = 0

    def gather_ints(self, values):
        self.asked += 1
        return [list(values)] * 2


@pytest.mark.parametrize(("every_call", "expected"), [(False, 2), (True, 4)])
def test_a_known_signature_is_not_compared_again_where_that_is_dear(every_call, expected):
    transport = Counted()
    agreement, looked = Agreement(transport, every_call), []
    for n in (1, 1, 2, 1):
        agreement.require("test", lambda n=n: looked.append(n) or {"n": n}, key=n)
    assert transport.asked == len(looked) == expected


@dataclass(frozen=True)
class Sloped(df.Causal):
    """A mask with a float, whose equality takes 1 and True for it."""

    slope: float


def test_signatures_with_equal_hashes_or_values_are_different():
    assert hash(-1.0) == hash(-2.0)
    options = [dict(scale=-1.0), dict(scale=-2.0), dict(softcap=0.0), dict(softcap=2.0)]
    options += [dict(mask=Sloped(slope)) for slope in (1, 1.0, True, 0.0, -0.0, float("nan"))]

    def work(transport):
        cp = df.ContextParallel(Spy(transport, verifies_every_call=False))
        q = torch.zeros(1, S // W, 2, 8)
        for chosen in options * 2:
            df.attention(q, q, q, cp=cp, **chosen)
        return len(cp.transport.asked)

    assert Simulator(W).run(work) == [len(options)] * W


def test_sinks_may_change_from_step_to_step():
    """They are parameters: their values are compared with a new signature only."""

    def work(transport):
        cp = df.ContextParallel(Spy(transport, verifies_every_call=False))
        q = torch.zeros(1, S // W, 2, 8)
        for step in range(5):
            df.attention(q, q, q, cp=cp, sinks=torch.full((2,), float(step)))
        return len(cp.transport.asked)

    assert Simulator(W).run(work) == [1] * W


def test_one_rank_asks_nobody():
    transport = Counted()
    transport.world_size = 1
    Agreement(transport, True).require("test", lambda: {"n": 1})
    Agreement(transport, True).refuse("test", others_compare=True)
    assert transport.asked == 0


def test_what_is_remembered_is_bounded():
    transport = Counted()
    agreement = Agreement(transport, every_call=False)
    for n in range(3000):  # documents that are new in every step
        for _ in range(2):
            agreement.require("test", lambda n=n: {"seq_len": n}, key=n)
    assert transport.asked == 3000
    assert len(agreement._known) <= 256


# --- One of several equal calls, and the backward of several calls ---


class Spy(SimulatedTransport):
    """Counts how often ranks are asked."""

    def __init__(self, transport, verifies_every_call=True):
        super().__init__(transport.simulator, transport.rank, verifies_every_call=verifies_every_call)
        object.__setattr__(self, "asked", [])

    def gather_ints(self, values):
        self.asked.append(len(values))
        return super().gather_ints(values)


def layers(cp, count):
    """Outputs of equal calls on inputs of their own."""
    for _ in range(count):
        q = torch.randn(1, S // W, 2, 8, requires_grad=True)
        yield df.attention(q, q, q, cp=cp)


@pytest.mark.parametrize(
    ("by_default", "check_every_call", "expected"),
    [(True, None, 6), (False, None, 1), (True, False, 1), (False, True, 6)],
)
def test_how_often_ranks_compare(by_default, check_every_call, expected):
    """Three equal calls, forward and backward."""

    def work(transport):
        spy = Spy(transport, by_default)
        cp = df.ContextParallel(spy, check_every_call=check_every_call)
        sum(out.sum() for out in layers(cp, 3)).backward()
        return spy.asked

    for asked in Simulator(W).run(work):
        assert len(asked) == expected and len(set(asked)) == 1  # rows of one width


def test_check_every_call_is_a_bool():
    with pytest.raises(ValueError, match="check_every_call: expected True, False or None, got 'yes'"):
        df.ContextParallel(df.transport.Alone(), check_every_call="yes")


def caught(work):
    """What each rank's ValueError says, whatever has been sent before."""

    def one(transport):
        with pytest.raises(ValueError) as error:
            work(df.ContextParallel(transport))
        return str(error.value)

    return Simulator(W).run(one)


def test_a_rank_that_skips_one_of_several_equal_calls():
    for rank, text in enumerate(caught(lambda cp: sum(out.sum() for out in layers(cp, 3 - (cp.rank == 1))).backward())):
        assert "ranks 0, 2, 3 the attention forward of call 3, rank 1 the attention backward of call 2" in text
        assert f"This is rank {rank}." in text


def test_a_rank_that_runs_backward_in_another_order():
    def work(cp):
        first, second = layers(cp, 2)
        for out in (first, second) if cp.rank == 3 else (second, first):
            out.sum().backward()

    for text in caught(work):
        assert "ranks 0, 1, 2 the attention backward of call 2, rank 3 the attention backward of call 1" in text


def test_a_rank_that_skips_a_call_without_a_backward():
    def work(cp):
        with torch.no_grad():
            outs = list(layers(cp, 3 - (cp.rank == 0)))
        cp.unshard(outs[-1])

    for text in caught(work):
        assert "rank 0 the unshard, ranks 1, 2, 3 the attention forward of call 3" in text


@pytest.mark.parametrize("context_fn", [df.keep_attention, None], ids=["kept", "recomputed"])
def test_checkpointed_calls_agree(context_fn):
    options = {} if context_fn is None else {"context_fn": context_fn}

    def work(transport):
        cp = df.ContextParallel(Spy(transport))
        x = torch.randn(1, S // W, 2, 8, requires_grad=True)
        y = x
        for _ in range(2):
            y = torch.utils.checkpoint.checkpoint(
                lambda x: df.attention(x, x, x, cp=cp), y, use_reentrant=False, **options
            )
        y.sum().backward()
        return len(cp.transport.asked)

    assert Simulator(W).run(work) == [4 if context_fn else 6] * W


# --- Calls of different kinds ---

KINDS = {
    "attention forward": lambda cp: next(layers(cp, 1)),
    "unshard": lambda cp: cp.unshard(torch.zeros(1, 4)),
    "batch": lambda cp: cp.agree("batch", seq_len=S, mask=df.Causal()),
    "settings": lambda cp: cp.agree("settings", lr=1e-3),
}


@pytest.mark.parametrize("refusing", [False, True])
def test_ranks_in_different_kinds_of_call(refusing):
    def work(cp):
        if refusing and cp.rank == 3:
            cp.refuse("settings: not these", "settings")
        list(KINDS.values())[cp.rank](cp)

    texts = caught(work)
    for text in texts[: 3 if refusing else 4]:
        assert all(f"rank {rank} the {kind}" in text for rank, kind in enumerate(KINDS))
        assert ("rank 3 refused this call" in text) == refusing
    assert not refusing or texts[3] == "settings: not these"


def test_a_rank_that_refuses_in_attention_stops_those_who_agree():
    def work(cp):
        if cp.rank == 0:
            cp.refuse("x: no", in_attention=True)
        cp.agree("batch", n=1)

    texts = caught(work)
    assert texts[0] == "x: no"
    assert all("rank 0 the attention forward of call 1, ranks 1, 2, 3 the batch" in text for text in texts[1:])


def test_fields_of_different_names():
    texts = caught(lambda cp: cp.agree("settings", **{f"lr{cp.rank // 2}": 1}))
    assert all("fields: the ranks compare settings by different names; rank" in text for text in texts)


def test_agree_compares_every_time():
    def work(transport):
        cp = df.ContextParallel(Spy(transport, verifies_every_call=False))
        for _ in range(3):
            cp.agree("batch", n=1)
        return len(cp.transport.asked)

    assert Simulator(2).run(work) == [3, 3]


def test_more_fields_than_a_message_has_room_for():
    texts = caught(lambda cp: cp.agree("settings", **{f"field{n}": n for n in range(40)}))
    assert all("fields: 40 are more than the 32" in text for text in texts)
