"""Values that differ between calls are inputs of a compiled graph, so one graph serves all calls of a form."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import distflash as df
from distflash import compiled as compiled_module
from distflash.compiled import join, split
from distflash.transport import Alone, Simulator
from tests.strategies import masks, patterns

S = 12
CP = df.ContextParallel(Alone())


@pytest.fixture(autouse=True)
def no_earlier_graphs():
    torch._dynamo.reset()


@dataclass(frozen=True)
class Steps(df.Mask):
    """A mask with ints, a float and a text: what is no int is part of the form."""

    ends_at: tuple[int, ...]
    name: str
    slack: float = 0.5

    def ends(self, positions, seq_len):
        raise NotImplementedError


@dataclass(frozen=True)
class Either(df.Mask):
    """A mask of any number of masks."""

    masks: tuple[df.Mask, ...]
    name: str = "either"

    @property
    def seq_len(self):
        return next((mask.seq_len for mask in self.masks if mask.seq_len is not None), None)

    def parts(self, positions, seq_len):
        return functools.reduce(df.masks.Or, self.masks).parts(positions, seq_len)


def eithers(seq_len):
    """Also within each other."""
    one = masks(seq_len) | patterns(seq_len)
    several = st.lists(one | st.lists(one, max_size=2).map(tuple).map(Either), max_size=3).map(tuple)
    return st.builds(Either, several, st.sampled_from(["a", "b"]))


@given(st.integers(1, 40).flatmap(lambda n: masks(n) | patterns(n) | eithers(n)))
def test_join_is_the_inverse_of_split(mask):
    form, data = split(mask, 0.5, 3.0, 0.0)
    again, *numbers, kv_layout, layout = join(form, data)
    assert kv_layout is None and layout is None
    assert again == mask and repr(again) == repr(mask) and numbers == [0.5, 3.0, 0.0]
    assert hash(form) == hash(split(mask, 0.5, 3.0, 0.0)[0])


def test_fields_that_are_no_ints_are_part_of_the_form():
    mask = df.Causal() & Steps((1, 2), "a", 0.25)
    form, data = split(mask, None, 0.0, 0.0)
    assert join(form, data)[0] == mask
    assert list(data.ints) == [1, 2] and data.boundaries is None
    others = [Steps((1, 2), "b", 0.25), Steps((1, 2), "a", 0.5), Steps((1, 2, 3), "a", 0.25)]
    assert form not in [split(df.Causal() & other, None, 0.0, 0.0)[0] for other in others]
    assert form == split(df.Causal() & Steps((7, 8), "a", 0.25), None, 0.0, 0.0)[0]


def test_what_is_in_tuples_of_masks_is_data_and_their_number_is_form():
    form, data = split(Either((df.Window(3), df.Documents([0, 2, 5]), df.Causal())), None, 0.0, 0.0)
    assert list(data.ints) == [3, 0, 3] and data.boundaries.tolist() == [0, 2, 5]
    assert form == split(Either((df.Window(4), df.Documents([0, 9]), df.Causal())), None, 0.0, 0.0)[0]
    for other in [Either((df.Window(3), df.Causal())), Either((df.Causal(), df.Window(3))), Either(())]:
        assert form != split(other, None, 0.0, 0.0)[0]


@dataclass(frozen=True, eq=False)
class Learned(df.Mask):
    bias: torch.Tensor


def test_a_field_of_floats_in_a_tensor_is_refused_and_not_rounded():
    with pytest.raises(ValueError, match=r"mask: a tensor in a field .*: expected a one-dim.*float32"):
        split(Learned(torch.tensor([0.5])), None, 0.0, 0.0)


def test_tensors_of_several_devices_meet_on_the_cpu():
    with FakeTensorMode():
        tensors = [torch.empty(3, dtype=torch.int32, device=device) for device in ("cuda", "cpu")]
        assert compiled_module._cat(tensors).device.type == "cpu"
        assert compiled_module._cat(tensors[:1] * 2).device.type == "cuda"
        assert compiled_module._cat(tensors).dtype == torch.int64


class Layer(nn.Module):
    """Attention as a decoder's layer has it, with keywords of its own."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, **options):
        return df.attention(q, k, v, cp=CP, **self.options, **options)


class Capped(nn.Module):
    """The keywords as attributes, which are the same ones for the compiler in all layers."""

    def __init__(self, scale, softcap):
        super().__init__()
        self.scale, self.softcap = scale, softcap

    def forward(self, q, k, v):
        return df.attention(q, k, v, mask=df.Causal(), cp=CP, scale=self.scale, softcap=self.softcap)


def inputs(seq_len=S):
    return [torch.randn(1, seq_len, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def with_gradients(function, *arguments, **options):
    out = function(*arguments, **options)
    wanted = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    return out, *torch.autograd.grad(out.square().sum(), wanted)


def assert_same(compiled, eager, *arguments, **options):
    got, expected = (with_gradients(f, *arguments, **options) for f in (compiled, eager))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def compiled(function, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def packed(count, seq_len=S):
    """So many documents, and others in every call."""
    return sorted([0, seq_len, *(1 + torch.randperm(seq_len - 1)[: count - 1]).tolist()])


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: df.Causal() & d], ids=["alone", "and"])
def test_documents_that_change_in_every_step(wrap):
    """Beyond the recompile limit, in numbers and in boundaries; given from outside."""
    layer = Layer()
    fast, counter = compiled(layer)
    for step in range(2 * torch._dynamo.config.recompile_limit):
        assert_same(fast, layer, *inputs(), mask=wrap(df.Documents(packed(1 + step % 7))))
    assert counter.frame_count <= 2


def test_documents_that_a_module_holds():
    layer = Layer(mask=None)
    fast, counter = compiled(layer)
    for step in range(2 * torch._dynamo.config.recompile_limit):
        layer.options["mask"] = df.Documents(packed(1 + step % 7))
        assert_same(fast, layer, *inputs())
    assert counter.frame_count <= 2


def test_documents_made_of_a_tensor_inside_the_compiled_function():
    def function(q, k, v, first, second):
        mask = df.Documents(first) & df.Causal() & df.Documents(second)
        return df.attention(q, k, v, mask=mask, cp=CP)

    fast, counter = compiled(function)
    for step in range(2 * torch._dynamo.config.recompile_limit):
        ends = (torch.tensor(packed(1 + (step + n) % 7), dtype=torch.int32) for n in (0, 3))
        assert_same(fast, function, *inputs(), *ends)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([0, 5, 5, 3, S], r"Documents\(cu_seqlens\)"),
        ([1, 5, S], r"Documents\(cu_seqlens\)"),
        ([0, 5, S + 1], "local tokens"),
    ],
)
def test_wrong_documents_of_a_tensor_are_refused_when_the_graph_runs(ends, words):
    fast, _ = compiled(lambda q, k, v, ends: df.attention(q, k, v, mask=df.Documents(ends), cp=CP))
    with pytest.raises(ValueError, match=words):
        fast(*inputs(), torch.tensor(ends))


def test_documents_of_a_tensor_that_holds_no_ints_are_refused():
    fast, _ = compiled(lambda q, k, v, ends: df.attention(q, k, v, mask=df.Documents(ends), cp=CP))
    with pytest.raises(Exception, match="expected a one-dimensional integer tensor"):
        fast(*inputs(), torch.tensor([0.0, S]))


def blocks(step):
    """Arguments of `df.BlockCausal`, and of the others below: other values in every step, and other lengths."""
    return (packed(1 + step % 7),)


def images(step):
    starts = sorted((2 * torch.randperm(S // 2)[: 2 + step % 4]).tolist())
    return starts, [1 + (start + step) % 2 for start in starts]


def rollouts(step):
    lengths = torch.tensor(packed(3 + step % 6)).diff().tolist()
    return [-1, *(int(torch.randint(-1, n, ())) for n in range(1, len(lengths)))], lengths


PATTERNS = pytest.mark.parametrize(
    ("kind", "arguments"),
    [(df.BlockCausal, blocks), (df.ImageBlocks, images), (df.Tree, rollouts)],
    ids=["blocks", "images", "tree"],
)
WRAPS = pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: df.Window(5, 1) & m | df.FirstTokens(2)], ids=["alone", "combined"]
)
STEPS = range(2 * torch._dynamo.config.recompile_limit)


@PATTERNS
@WRAPS
def test_patterns_made_of_tensors_inside_the_compiled_function(kind, arguments, wrap):
    def function(q, k, v, *integers):
        return df.attention(q, k, v, mask=wrap(kind(*integers)), cp=CP)

    fast, counter = compiled(function)
    for step in STEPS:
        dtypes = (torch.int32, torch.int64)  # two tensors need not have one dtype
        integers = [torch.tensor(x, dtype=dtype) for x, dtype in zip(arguments(step), dtypes, strict=False)]
        assert_same(fast, function, *inputs(), *integers)
    assert counter.frame_count <= 2


@PATTERNS
@WRAPS
def test_patterns_made_outside_the_compiled_function(kind, arguments, wrap):
    layer = Layer()
    fast, counter = compiled(layer)
    for step in STEPS:
        assert_same(fast, layer, *inputs(), mask=wrap(kind(*arguments(step))))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "make",
    [
        df.BlockCausal,
        lambda n: df.BlockCausal([0, n, n, S]),
        lambda n: df.BlockCausal([0, n, n + 4, n - (n - S)]),
        lambda n: df.ImageBlocks([0, n], [2, S - n]),
        lambda n: df.ImageBlocks((n - 2, n), (2, 0)),
        lambda n: df.Tree([-1, 0, 0, 2], [n, 2, S - n - 2, 0]),
        lambda n: df.Tree([-1, -1, 0, n - (n - 1)], [n, 1, 0, S - n - 1]),
    ],
)
def test_patterns_made_of_ints_inside_the_compiled_function(make):
    """One graph for all numbers, without a guard on which of them are equal or 0."""

    def function(q, k, v, n):
        return df.attention(q, k, v, mask=make(n), cp=CP)

    fast, counter = compiled(function)
    for n in range(2, 9):
        assert_same(fast, function, *inputs(), n)
    assert counter.frame_count <= 2


def test_documents_made_of_ints_share_a_graph_though_some_are_empty():
    def function(q, k, v, *ends):
        return df.attention(q, k, v, mask=df.Documents([0, *ends, S]), cp=CP)

    fast, counter = compiled(function)
    for ends in [(3, 7), (4, 5), (6, 6), (8, 12), (12, 12)]:
        assert_same(fast, function, *inputs(), *ends)
    assert counter.frame_count <= 3  # the compiler takes equal numbers for one until they differ


def test_a_tree_of_fixed_parents_and_lengths_in_a_tensor():
    def function(q, k, v, lengths):
        return df.attention(q, k, v, mask=df.Tree([-1, 0, 0], lengths), cp=CP)

    fast, counter = compiled(function)
    for n in range(S - 2):
        assert_same(fast, function, *inputs(), torch.tensor([n, S - 2 - n, 2]))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", [df.Documents, df.BlockCausal])
def test_numpy_arrays_inside_the_compiled_function(kind):
    def function(q, k, v, ends):
        return df.attention(q, k, v, mask=kind(ends), cp=CP)

    fast, counter = compiled(function)
    for step in STEPS:
        assert_same(fast, function, *inputs(), np.array(packed(2 + step % 7)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (df.BlockCausal, ([0, 5, 3, S],), r"BlockCausal\(size_or_boundaries\): must not decrease"),
        (df.BlockCausal, ([0, 5, S + 1],), "local tokens"),
        (df.ImageBlocks, ([0, 2], [3, 1]), r"ImageBlocks\(starts\): .*starts\[1\] = 2 is below 3"),
        (df.ImageBlocks, ([0, 2, 4], [1, 1]), r"ImageBlocks\(lengths\): expected 3, as many as starts, got 2"),
        (df.Tree, ([-1, 1], [3, S - 3]), r"Tree\(parents\): .*parents\[1\] = 1"),
        (df.Tree, ([-1, 0], [-2, S + 2]), r"Tree\(lengths\): expected at least 0 tokens"),
        (df.Tree, ([-1, 0], [S, 2]), "local tokens"),
    ],
)
@pytest.mark.parametrize("container", [torch.tensor, list])
def test_wrong_patterns_are_refused_when_the_graph_runs(kind, wrong, words, container):
    fast, _ = compiled(lambda q, k, v, *integers: df.attention(q, k, v, mask=kind(*integers), cp=CP))
    with pytest.raises(ValueError, match=words):
        fast(*inputs(), *map(container, wrong))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: df.BlockCausal(x[None]), "BlockCausal.*expected a one-dimensional integer tensor"),
        (lambda x: df.ImageBlocks(x, x / 2), r"ImageBlocks\(lengths\): expected a one-dimensional integer tensor"),
        (lambda x: df.Tree(x > 0, x), r"Tree\(parents\): expected a one-dimensional integer tensor"),
        (lambda x: df.Tree([-1, 0.5], x), r"Tree\(parents\): expected whole numbers"),
        (lambda x: df.BlockCausal("2"), "BlockCausal.*expected an int of at least 1 or boundaries"),
    ],
)
def test_patterns_of_what_holds_no_ints_are_refused_while_compiling(make, words):
    fast, _ = compiled(lambda q, k, v, x: df.attention(q, k, v, mask=make(x), cp=CP))
    with pytest.raises(Exception, match=words):
        fast(*inputs(), torch.tensor([0, S]))


@pytest.mark.parametrize("inside", [True, False])
def test_tuples_of_masks(inside):
    def function(q, k, v, mask):
        return df.attention(q, k, v, mask=Either((df.Window(1), mask)) if inside else mask, cp=CP)

    fast, counter = compiled(function)
    for step in STEPS:
        documents = df.Documents(packed(1 + step % 7))
        mask = documents if inside else Either((df.Window(step + 2), documents & df.Causal()))
        assert_same(fast, function, *inputs(), mask)
    assert counter.frame_count <= 2


def test_windows_that_change():
    layer = Layer()
    fast, counter = compiled(layer)
    for left in range(2 * torch._dynamo.config.recompile_limit):
        assert_same(fast, layer, *inputs(), mask=df.Window(left))
    assert counter.frame_count <= 3  # 0 and 1 are special to the compiler


def test_layers_with_their_own_scales_and_softcaps():
    counter = CompileCounterWithBackend("aot_eager")
    for n in range(2 * torch._dynamo.config.recompile_limit):
        layer = Capped(0.1 * (n + 1), 3.0 + 0.3 * n)
        assert_same(torch.compile(layer, fullgraph=True, backend=counter), layer, *inputs())
    assert counter.frame_count <= 2


def test_layers_with_their_own_scales_and_softcaps_in_one_graph():
    layers = [Capped(0.1 * (n + 1), 3.0 + 0.3 * n) for n in range(4)]

    def model(q, k, v):
        for layer in layers:
            q = layer(q, k, v)
        return q

    fast, counter = compiled(model)
    assert_same(fast, model, *inputs())
    assert counter.frame_count == 1


@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_a_scale_that_is_data_is_refused_too(scale):
    fast, _ = compiled(lambda q, k, v, scale: df.attention(q, k, v, scale=scale, cp=CP))
    for good in (0.5, 0.25):
        fast(*inputs(), good)
    with pytest.raises(Exception, match="scale: expected a finite number other than 0"):
        fast(*inputs(), scale)


@pytest.mark.parametrize(
    "mask", [df.Causal(), df.Window(3, 2) | df.PrefixLM(2), df.Causal() & df.Documents([0, 5, S])], ids=repr
)
def test_dynamic(mask):
    layer = Layer()
    fast, counter = compiled(layer, dynamic=True)
    assert_same(fast, layer, *inputs(), mask=mask)
    graphs = counter.frame_count  # the compiler begins again when it meets floats
    for seq_len in () if mask.seq_len else (S + 1, 40):
        assert_same(fast, layer, *inputs(seq_len), mask=mask)
    assert counter.frame_count == graphs


def test_a_dynamic_module():
    torch.manual_seed(0)
    module = df.nn.SelfAttention(16, heads=4, kv_heads=2, cp=CP).double()
    fast, counter = compiled(module, dynamic=True)
    graphs = []
    for step, seq_len in enumerate((S, S + 1, 40, 40)):
        x = torch.randn(1, seq_len, 16, dtype=torch.float64, requires_grad=True)
        assert_same(fast, module, x)
        assert_same(fast, module, x, mask=df.Causal() & df.Documents(packed(2 + step, seq_len)))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


def test_backward_of_compiled_calls_knows_its_forward():
    """The number of a call is data, too: what the backward of the first of two calls brings is not the second's."""

    def work(transport):
        cp = df.ContextParallel(transport)
        numbers, require = [], cp.agreement.require
        cp.agreement.require = lambda *a, number=0, **o: (numbers.append(number), require(*a, number=number, **o))
        fast = torch.compile(lambda q: df.attention(q, q, q, cp=cp), fullgraph=True, backend="aot_eager")
        outs = [fast(torch.ones(1, 4, 2, 8, requires_grad=True)) for _ in range(3)]
        for n in (1, 0, 2):
            outs[n].sum().backward()
        return numbers

    assert Simulator(2).run(work) == [[1, 2, 3, 2, 1, 3]] * 2
