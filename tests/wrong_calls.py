"""Wrong calls of the public API, as a table: what is wrong, the call, and what its error has to say.

Each is made on every rank of two, which hold 8 tokens by zigzag, 4 each. Words are a regex that the error's text starts
with or, where they begin with ".*", contains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import distflash as df

S, W = 8, 2
zeros = torch.zeros


@dataclass(frozen=True)
class Wrong:
    """One call. All ranks must raise ``error`` with ``words``, and no message may have been sent."""

    what: str
    call: Callable[[df.ContextParallel], Any]
    words: str
    error: type[Exception] = ValueError
    # What other ranks may be doing, which are told if one rank alone makes this call.
    right: Callable[[df.ContextParallel], Any] | None = None
    # How many ranks of one process make it. Derivatives in progress are the process's: there, ranks would share them.
    simulated: int = W


def tensors(**changes: Any) -> dict[str, Any]:
    """Valid arguments of a rank, with these changes."""
    shapes = {"q": (1, S // W, 4, 16), "k": (1, S // W, 2, 16), "v": (1, S // W, 2, 16)}
    return {name: zeros(shape) for name, shape in shapes.items()} | changes


def attend(what: str, words: str, **changes: Any) -> Wrong:
    """A call of attention with valid arguments, except these changes."""
    return Wrong(
        what,
        lambda cp: df.attention(**tensors(**changes), cp=cp),
        words,
        right=lambda cp: df.attention(**tensors(), cp=cp),
    )


def every(change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return {name: change(t) for name, t in tensors().items()}


def shaped(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None) -> dict[str, torch.Tensor]:
    return {"q": zeros(q), "k": zeros(k), "v": zeros(k if v is None else v)}


class LooksDistributed(torch.Tensor):
    """As a DTensor does to those that ask."""

    device_mesh = None

    def to_local(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def dtensor(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(LooksDistributed)


def learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


DTYPES = "q: expected float16, bfloat16, float32 or float64, got"
TENSORS = [
    attend("q is None", "q: expected a tensor, got None", q=None),
    attend("k is a list", r"k: expected a tensor, got \[1.0\]", k=[1.0]),
    attend("v is an array",
        r"v: expected a tensor, got a ndarray of float32 \[1, 4, 2, 16\]", v=np.zeros((1, 4, 2, 16), "f")),
    attend("three dimensions", "q: expected four dimensions", q=zeros(4, 4, 16)),
    attend("five dimensions of k", r"k: expected four dimensions .*\(1, 1, 4, 2, 16\)", k=zeros(1, 1, 4, 2, 16)),
    attend("packed without a batch", "q: expected four dimensions", **every(lambda t: t[0])),
    attend("a scalar", r"v: expected four dimensions .*got shape \(\)", v=zeros(())),
    attend("another batch in v", "k, v: batch sizes 1 and 2 differ from q's 1", v=zeros(2, 4, 2, 16)),
    attend("another batch in q", "k, v: batch sizes 1 and 1 differ from q's 3", q=zeros(3, 4, 4, 16)),
    attend("fewer keys",
        "k, v: 3 and 3 local tokens differ from q's 4; this is self-.*for other queries pass q_start and q_len",
        k=zeros(1, 3, 2, 16),
        v=zeros(1, 3, 2, 16)),
    attend("fewer values", "k, v: 4 and 3 local tokens differ from q's 4", v=zeros(1, 3, 2, 16)),
    attend("one query, as in decoding", "k, v: 4 and 4 local tokens differ from q's 1", q=zeros(1, 1, 4, 16)),
    attend("heads no multiple of kv_heads",
        "q, k: 4 query heads are not a multiple of 3 key/value heads", **shaped((1, 4, 4, 16), (1, 4, 3, 16))),
    attend("fewer heads than kv_heads",
        "q, k: 4 query heads are not a multiple of 8", **shaped((1, 4, 4, 16), (1, 4, 8, 16))),
    attend("no query heads", "q, k: 0 query heads are not a multiple of 2", q=zeros(1, 4, 0, 16)),
    attend("no key heads", "q, k: 4 query heads are not a multiple of 0", **shaped((1, 4, 4, 16), (1, 4, 0, 16))),
    attend("other heads in v", "v: 4 heads differ from k's 2", v=zeros(1, 4, 4, 16)),
    attend("another head_dim in k", "k: head_dim 8 differs from q's 16", k=zeros(1, 4, 2, 8)),
    attend("no head_dim in v", "q, v: head dims 16 and 0", v=zeros(1, 4, 2, 0)),
    attend("no head_dim in q and k", "q, v: head dims 0 and 16", **shaped((1, 4, 4, 0), (1, 4, 2, 0), (1, 4, 2, 16))),
    attend("heads first, grouped",
        r"q, k, v: look heads-first, .* 4 query heads, 2 key/value heads and 3 tokens; pass q.transpose\(1, 2\)",
        **shaped((1, 4, 3, 16), (1, 2, 3, 16))),
    attend("heads first, alike",
        r"q: looks heads-first, .*with 2 heads and 4 tokens on rank \d of 2.*pass q.transpose\(1, 2\)", seq_len=8,
        **shaped((1, 2, 4, 16), (1, 2, 4, 16))),
    attend("heads first, documents",
        "q: looks heads-first", mask=df.Documents([0, 3, 8]), **shaped((1, 2, 4, 16), (1, 2, 4, 16))),
    attend("mixed dtypes in k",
        "k: has dtype torch.bfloat16 but q has torch.float32; cast them", k=zeros(1, 4, 2, 16).bfloat16()),
    attend("mixed dtypes in v", "v: has dtype torch.float16 but q has torch.float32", v=zeros(1, 4, 2, 16).half()),
    attend("v elsewhere",
        "v: is on meta but q is on cpu; move them to one device", v=zeros(1, 4, 2, 16, device="meta")),
    attend("no data", "q: is on meta and holds no data to send", **every(lambda t: t.to("meta"))),
    attend("whole numbers", f"{DTYPES} torch.int32; cast it", **every(torch.Tensor.int)),
    attend("booleans", f"{DTYPES} torch.bool", **every(torch.Tensor.bool)),
    attend("complex numbers", f"{DTYPES} torch.complex64", **every(lambda t: t.to(torch.complex64))),
    attend("conjugated", f"{DTYPES} torch.complex64", **every(lambda t: t.to(torch.complex64).conj())),
    attend("float8", f"{DTYPES} torch.float8_e4m3fn", **every(lambda t: t.to(torch.float8_e4m3fn))),
    attend("sparse q",
        r"q: has layout torch.sparse_coo; pass a dense tensor, q.to_dense\(\)", q=zeros(1, 4, 4, 16).to_sparse()),
    attend("sparse v", "v: has layout torch.sparse_coo", v=zeros(1, 4, 2, 16).to_sparse()),
    attend("mkldnn", "k: has layout torch._mkldnn", k=zeros(1, 4, 2, 16).to_mkldnn()),
    attend("jagged",
        "q: is a nested tensor; pack its sequences into one, and say where they end by df.Documents",
        q=torch.nested.nested_tensor([zeros(3, 4, 16), zeros(1, 4, 16)], layout=torch.jagged)),
    attend("a DTensor", r"q: is a DTensor; pass this rank's part of it, q.to_local\(\)", q=dtensor(zeros(1, 4, 4, 16))),
    attend("keys as a DTensor", "k: is a DTensor", k=dtensor(zeros(1, 4, 2, 16))),
]  # fmt: skip

ONE_NUMBER = "expected one real number for all heads, got"
NUMBERS = [
    attend("scale is a parameter",
        "scale: requires a gradient, which would be dropped; multiply q by it instead", scale=learned()),
    attend("scale requires a gradient",
        r"scale: requires a gradient, .*scale.detach\(\) for a constant", scale=torch.tensor(0.5, requires_grad=True)),
    attend("scale a head",
        rf"scale: {ONE_NUMBER} a Tensor of torch.float32 \[4\]; multiply q by it instead", scale=torch.ones(4)),
    attend("a learned scale a head", "scale: requires a gradient", scale=learned(4)),
    attend("scale in brackets", rf"scale: {ONE_NUMBER} \[0.5\]", scale=[0.5]),
    attend("scale as a string", f"scale: {ONE_NUMBER} '0.5'", scale="0.5"),
    attend("scale as a bool", f"scale: {ONE_NUMBER} True", scale=True),
    attend("scale is complex", rf"scale: {ONE_NUMBER} \(0.5\+0j\)", scale=0.5 + 0j),
    attend("scale is an array", f"scale: {ONE_NUMBER} a ndarray", scale=np.ones(4)),
    attend("scale without data", f"scale: {ONE_NUMBER} ", scale=torch.tensor(0.5, device="meta")),
    attend("scale of 0", "scale: expected a finite number other than 0", scale=0.0),
    attend("scale of NaN", "scale: expected a finite number other than 0", scale=float("nan")),
    attend("infinite scale", "scale: expected a finite number other than 0", scale=float("-inf")),
    attend("scale of NaN as a tensor", "scale: expected a finite number other than 0", scale=torch.tensor(torch.nan)),
    attend("a scale that is 0 in float32", "scale: expected a finite number other than 0", scale=1e-320),
    attend("a scale that is infinite in float32", "scale: expected a finite number other than 0", scale=10**400),
    attend("softcap is a parameter",
        r"softcap: requires a gradient, .*not differentiable here; pass float\(softcap\)", softcap=learned()),
    attend("softcap a head", f"softcap: {ONE_NUMBER} a Tensor", softcap=torch.ones(4)),
    attend("softcap as a string", f"softcap: {ONE_NUMBER} '30'", softcap="30"),
    attend("softcap as a bool", f"softcap: {ONE_NUMBER} True", softcap=True),
    attend("negative softcap", "softcap: expected a positive number .*or None for none, got -1.0", softcap=-1.0),
    attend("negative softcap as a fraction", "softcap: expected a positive number", softcap=Fraction(-1, 2)),
    attend("infinite softcap", "softcap: expected a positive number", softcap=float("inf")),
    attend("softcap of NaN", "softcap: expected a positive number", softcap=np.float32("nan")),
    attend("dropout out of range",
        "dropout_p: expected a probability of at least 0 and below 1, got 1.5", dropout_p=1.5),
    attend("negative dropout", "dropout_p: expected a probability", dropout_p=-0.1),
    attend("dropout of NaN", "dropout_p: expected a probability", dropout_p=float("nan")),
    attend("dropout of None", "dropout_p: expected a probability .*got None", dropout_p=None),
    attend("dropout as a string",
        f"dropout_p: {ONE_NUMBER} 'none'; one probability is for all heads", dropout_p="none"),
    attend("dropout as a bool", f"dropout_p: {ONE_NUMBER} True", dropout_p=True),
    attend("dropout without a seed",
        "dropout_seed: is missing, but dropout_p is 0.5; pass an int, .*the same on all ranks", dropout_p=0.5),
    attend("a seed as a float",
        "dropout_seed: expected an int that fits int64, got 1.5", dropout_p=0.5, dropout_seed=1.5),
    attend("a seed too large", "dropout_seed: expected an int that fits int64", dropout_p=0.5, dropout_seed=2**63),
    attend("a seed of no dropout", "dropout_seed: expected an int", dropout_seed="0"),
    attend("a seed a head",
        r"dropout_seed: expected an int64 tensor \[\], got a Tensor of torch.int64 \[4\]",
        dropout_p=0.5, dropout_seed=torch.zeros(4, dtype=torch.int64)),
    attend("a seed of int32",
        r"dropout_seed: expected an int64 tensor \[\], got ", dropout_p=0.5, dropout_seed=torch.tensor(3).int()),
    attend("a seed elsewhere", "dropout_seed: is on meta but q is on cpu; move it",
        dropout_p=0.5, dropout_seed=torch.tensor(3, device="meta")),
    attend("a seed as a DTensor", "dropout_seed: is a DTensor", dropout_p=0.5, dropout_seed=dtensor(torch.tensor(3))),
]  # fmt: skip

PER_HEAD = [
    attend("sinks as a list", r"sinks: expected a floating-point tensor \[heads\], got \[0.0, 0.0\]", sinks=[0.0, 0.0]),
    attend("one sink", "sinks: expected a floating-point tensor", sinks=0.0),
    attend("sinks of the wrong length", r"sinks: expected shape \[4\], one per query head, got \[2\]", sinks=zeros(2)),
    attend("sinks in two dimensions", r"sinks: expected shape \[4\].*got \[1, 4\]", sinks=zeros(1, 4)),
    attend("sinks as ints", "sinks: expected a floating-point tensor", sinks=zeros(4).int()),
    attend("sinks elsewhere", "sinks: is on meta but q is on cpu; move it", sinks=zeros(4, device="meta")),
    attend("sinks as a DTensor", r"sinks: is a DTensor; .*sinks.to_local\(\)", sinks=dtensor(zeros(4))),
    attend("sparse sinks", "sinks: has layout torch.sparse_coo", sinks=zeros(4).to_sparse()),
    attend("slopes as a list", "alibi_slopes: expected a floating-point tensor", alibi_slopes=[0.5] * 4),
    attend("slopes of the wrong length", r"alibi_slopes: expected shape \[4\]", alibi_slopes=zeros(1)),
    attend("complex slopes",
        "alibi_slopes: expected a floating-point tensor", alibi_slopes=zeros(4, dtype=torch.complex64)),
    attend("slopes elsewhere", "alibi_slopes: is on meta but q is on cpu", alibi_slopes=zeros(4, device="meta")),
    attend("slopes that want a gradient",
        r"alibi_slopes: requires a gradient, .*alibi_slopes.detach\(\)", alibi_slopes=learned(4)),
]  # fmt: skip

NO = "attention has no such keyword;"
KEYWORDS = [
    attend("causal", rf"causal: {NO} write mask=df.Causal\(\)", causal=True),
    attend("is_causal", rf"is_causal: {NO} write mask=df.Causal\(\)", is_causal=True),
    attend("is_causal=False", f"is_causal: {NO}", is_causal=False),
    attend("attn_mask", f"attn_mask: {NO} masks are objects, .* write mask= and one of df.Causal", attn_mask=None),
    attend("attention_mask", f"attention_mask: {NO} masks are objects", attention_mask=torch.ones(1, 4)),
    attend("block_mask", f"block_mask: {NO} masks are objects", block_mask=None),
    attend("window_size",
        rf"window_size: {NO} write mask=df.Window\(left, right\); .*sys.maxsize", window_size=(-1, -1)),
    attend("sliding_window", rf"sliding_window: {NO} .*df.Window\(w - 1\)", sliding_window=128),
    attend("cu_seqlens_q",
        rf"cu_seqlens_q: {NO} write mask=df.Documents\(cu_seqlens\)", cu_seqlens_q=zeros(2), cu_seqlens_k=zeros(2)),
    attend("max_seqlen_q", f"max_seqlen_q: {NO} leave it out", max_seqlen_q=8),
    attend("segment_ids", rf"segment_ids: {NO} write mask=df.Documents", segment_ids=zeros(1, 4)),
    attend("softmax_scale", f"softmax_scale: {NO} write scale=", softmax_scale=0.125),
    attend("logits_soft_cap", f"logits_soft_cap: {NO} write softcap=", logits_soft_cap=30.0),
    attend("dropout as elsewhere", f"dropout: {NO} write dropout_p=, and dropout_seed=", dropout=0.0),
    attend("score_mod", f"score_mod: {NO} scores change by scale=, softcap= and alibi_slopes=", score_mod=None),
    attend("enable_gqa", f"enable_gqa: {NO} leave it out", enable_gqa=True),
    attend("s_aux", f"s_aux: {NO} write sinks=", s_aux=None),
    attend("return_attn_probs", f"return_attn_probs: {NO} write return_lse=True", return_attn_probs=True),
    attend("group", rf"group: {NO} write cp=df.ContextParallel\(group\)", group=None),
    attend("kernel", f"kernel: {NO} it belongs to the group", kernel=None),
    attend("layout", f"layout: {NO} it belongs to the group", layout=df.Zigzag()),
    attend("deterministic", rf"deterministic: {NO} .*df.kernels.Hopper\(deterministic=True\)", deterministic=True),
    attend("tensor_layout",
        rf"tensor_layout: {NO} q, k and v are \[batch, seq_local, heads, head_dim\]", tensor_layout="HND"),
    attend("a slip", f"sofcap: {NO} did you mean softcap=.*it takes mask, cp, seq_len", sofcap=30.0),
    attend("a cache of another library", f"k_cache: {NO} write cache=, a df.Cache", k_cache=zeros(4, 8)),
    attend("positions", f"q_positions: {NO} leave it out", q_positions=torch.arange(4)),
    attend("nothing like it", f"frobnicate: {NO} it takes mask, cp, seq_len", frobnicate=1),
]  # fmt: skip

MASKS_OF_A_CALL = [
    attend("mask as a string", "mask: expected a Mask such as .*'causal'; objects, not strings", mask="causal"),
    attend("mask as a class", r"mask: expected a Mask .*not the class: Causal\(\)", mask=df.Causal),
    attend("no mask",
        r"mask: expected a Mask .*got None; a causal mask is df.Causal\(\), and none is df.Full\(\)", mask=None),
    attend("mask as a bool", "mask: expected a Mask .*got True; a causal mask is", mask=True),
    attend("a mask of booleans",
        r"mask: expected a Mask .*got a Tensor of torch.bool \[4, 8\]; masks are objects",
        mask=torch.ones(4, 8).bool()),
    attend("a mask of floats",
        "mask: expected a Mask .*got a Tensor of torch.float32 .*masks are objects", mask=zeros(4, 8)),
    attend("two masks in a list", "mask: expected a Mask .*combine masks with &", mask=[df.Causal(), df.Window(3)]),
    attend("a window as a number",
        r"mask: expected a Mask .*got 128; a causal window of w keys is df.Window\(w - 1\)", mask=128),
    attend("a rule as a function",
        r"mask: expected a Mask .*a rule of your own is a subclass of df.Mask", mask=lambda b, h, i, j: i >= j),
    attend("a layout for a mask", "mask: expected a Mask .*got Zigzag", mask=df.Zigzag()),
    attend("documents of another length",
        "mask: cu_seqlens end at 9 but seq_len is 8; they must end at S", mask=df.Documents([0, 3, 9]), seq_len=8),
    attend("documents of another length than held", "q: 4 local tokens, but .* gives", mask=df.Documents([0, 3, 12])),
]  # fmt: skip

SEQ_LEN = "seq_len: expected the global length, an int of at least 0"
LENGTHS = [
    attend("another length",
        r"q: 4 local tokens, but Zigzag\(\) gives rank \d of 2 8 of seq_len=16; shard with cp.shard", seq_len=16),
    attend("the local length", r"q: 4 local tokens, but Zigzag\(\) gives rank \d of 2 2 of seq_len=4", seq_len=4),
    attend("seq_len as a float", f"{SEQ_LEN}, got 8.0", seq_len=8.0),
    attend("seq_len as a string", f"{SEQ_LEN}, got '8'", seq_len="8"),
    attend("seq_len as a bool", f"{SEQ_LEN}, got True", seq_len=True),
    attend("seq_len as a list", rf"{SEQ_LEN}, got \[8\]", seq_len=[8]),
    attend("seq_len as a tensor of lengths", f"{SEQ_LEN}, got a Tensor", seq_len=torch.tensor([8, 8])),
    attend("negative seq_len", f"{SEQ_LEN} and at most 2147483647, got -8", seq_len=-8),
    attend("seq_len beyond int32", f"{SEQ_LEN} and at most 2147483647, got {2**31}", seq_len=2**31),
    attend("seq_len beyond int64", f"{SEQ_LEN} and at most 2147483647", seq_len=2**70),
    attend("documents beyond int32", f"{SEQ_LEN} and at most", mask=df.Documents([0, 2**40])),
]  # fmt: skip


def transform(what: str, call: Callable[[df.ContextParallel], Any], words: str, error: Any = ValueError) -> Wrong:
    return Wrong(what, call, words, error, simulated=1)


def tangent(name: str, shape: tuple[int, ...] = (1, S // W, 4, 16)) -> Callable[[df.ContextParallel], Any]:
    """A call in which one argument carries a tangent of forward-mode AD."""

    def call(cp: df.ContextParallel) -> Any:
        x = zeros(shape)
        with forward_ad.dual_level():
            return df.attention(**tensors(**{name: forward_ad.make_dual(x, torch.ones_like(x))}), cp=cp)

    return call


def transformed(transform: Callable[..., Any], *more: Any) -> Callable[[df.ContextParallel], Any]:
    """A transform of torch.func around a call, as a function of q."""
    return lambda cp: transform(lambda q: df.attention(**tensors(q=q), cp=cp).sum(), *more)(tensors()["q"])


def jvp(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q: torch.func.jvp(function, (q,), (torch.ones_like(q),))


def twice(cp: df.ContextParallel) -> Any:
    inputs = tensors(q=zeros(1, S // W, 4, 16, requires_grad=True))
    first = torch.autograd.grad(df.attention(**inputs, cp=cp).square().sum(), inputs["q"], create_graph=True)[0]
    return first.sum().backward()


TANGENT = "has a tangent of forward-mode AD .*use reverse mode"
NESTED = "q: is differentiated by torch.func .*use reverse mode: loss.backward"
TRANSFORMS = [
    transform("a dual number as q", tangent("q"), f"q: {TANGENT}"),
    transform("a dual number as k", tangent("k", (1, S // W, 2, 16)), f"k: {TANGENT}"),
    transform("dual numbers as sinks", tangent("sinks", (4,)), f"sinks: {TANGENT}"),
    transform("a dual number as scale", tangent("scale", ()), f"scale: {TANGENT}"),
    transform("torch.func.jvp", transformed(jvp), f"q: {TANGENT}"),
    transform("torch.func.jacfwd", transformed(torch.func.jacfwd), f"q: {TANGENT}"),
    transform("torch.func.grad", transformed(torch.func.grad), NESTED),
    transform("torch.func.jacrev", transformed(torch.func.jacrev), NESTED),
    transform("torch.func.hessian", transformed(torch.func.hessian), NESTED),
    transform("double backward", twice, ".*differentiate twice", RuntimeError),
]


def making(what: str, make: Callable[[], Any], words: str, error: type[Exception] = ValueError) -> Wrong:
    """What fails as it is made, before there is a call."""
    return Wrong(what, lambda cp: make(), words, error)


COUNT = "expected an int of at least"
DOCUMENTS = r"Documents\(cu_seqlens\): "
MASKS = [
    making("-1 for no limit",
        lambda: df.Window(-1, 0), rf"Window\(left\): {COUNT} 0, got -1; for no limit write sys.maxsize"),
    making("-1 for no limit after", lambda: df.Window(3, -1), r"Window\(right\): .*for no limit write sys.maxsize"),
    making("infinite window", lambda: df.Window(float("inf")), r"Window\(left\): .*for no limit write sys.maxsize"),
    making("no window", lambda: df.Window(None), rf"Window\(left\): {COUNT} 0, got None"),
    making("a window as a pair", lambda: df.Window((3, 0)), rf"Window\(left\): {COUNT} 0"),
    making("a window as a string", lambda: df.Window("3"), rf"Window\(left\): {COUNT} 0"),
    making("a window as a bool", lambda: df.Window(True), rf"Window\(left\): {COUNT} 0"),
    making("negative prefix", lambda: df.PrefixLM(-1), rf"PrefixLM\(length\): {COUNT} 0"),
    making("prefix lengths of a batch", lambda: df.PrefixLM(torch.tensor([3, 4])), rf"PrefixLM\(length\): {COUNT} 0"),
    making("chunks of nothing", lambda: df.Chunked(0), rf"Chunked\(size\): {COUNT} 1"),
    making("half a chunk", lambda: df.Chunked(0.5), rf"Chunked\(size\): {COUNT} 1"),
    making("lengths, not ends", lambda: df.Documents([3, 5]), f"{DOCUMENTS}.*starting at 0"),
    making("lengths after a 0",
        lambda: df.Documents([0, 5, 3]), f"{DOCUMENTS}must not decrease.*cumulative lengths, not lengths"),
    making("padded with zeros",
        lambda: df.Documents([0, 3, 8, 0, 0]), f"{DOCUMENTS}must not decrease.*pad by repeating the last"),
    making("padded with -1", lambda: df.Documents(torch.tensor([0, 3, 8, -1])), f"{DOCUMENTS}must not decrease"),
    making("no documents", lambda: df.Documents([]), rf"{DOCUMENTS}expected at least \[0, S\]"),
    making("a number", lambda: df.Documents(8), f"{DOCUMENTS}expected whole numbers"),
    making("a string", lambda: df.Documents("0, 8"), f"{DOCUMENTS}expected whole numbers"),
    making("fractions", lambda: df.Documents([0, 2.5, 8]), f"{DOCUMENTS}expected whole numbers"),
    making("NaN", lambda: df.Documents([0, float("nan")]), f"{DOCUMENTS}expected whole numbers"),
    making("one list a sequence", lambda: df.Documents([[0, 3, 8], [0, 4, 8]]), f"{DOCUMENTS}expected whole numbers"),
    making("a tensor of floats",
        lambda: df.Documents(torch.tensor([0.0, 8.0])), f"{DOCUMENTS}expected a one-dimensional integer"),
    making("a tensor a sequence",
        lambda: df.Documents(torch.tensor([[0, 8]])), f"{DOCUMENTS}expected a one-dimensional integer"),
    making("a tensor without data",
        lambda: df.Documents(zeros(2, dtype=torch.int32, device="meta")), f"{DOCUMENTS}is on meta"),
    making("beyond int64", lambda: df.Documents([0, 2**70]), f"{DOCUMENTS}expected at most"),
    making("and, not &",
        lambda: df.Causal() and df.Window(3), r"mask: Causal\(\) has no truth value; combine masks with `a & b`"),
    making("documents of two lengths",
        lambda: df.Documents([0, 8]) & df.Documents([0, 9]), "mask: .*different lengths, 8 and 9"),
    making("a mask & a tensor", lambda: df.Causal() & torch.ones(3), ".*unsupported operand", TypeError),
]  # fmt: skip


@dataclass(frozen=True)
class Wraps(df.Mask):
    """A user's own, with a number that nothing has clamped."""

    n: int

    def ends(self, positions: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(positions), positions + 1 + self.n


class Falls(df.Mask):
    def ends(self, positions: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(positions), seq_len - positions


class Loses(df.Contiguous):
    """A user's own layout, which leaves out position 0, and gives rank 0 position 1 twice."""

    def ranges(self, seq_len: int, world_size: int, rank: int) -> tuple[range, ...]:
        return (range(1, 2), range(1, 4)) if rank == 0 else (range(4, 8),)


def remade(cp: df.ContextParallel, **changes: Any) -> df.ContextParallel:
    return df.ContextParallel(cp.transport, **changes)


def group(what: str, words: str, **changes: Any) -> Wrong:
    return Wrong(what, lambda cp: df.ContextParallel(**{"group": cp.transport} | changes), words)


GROUPS = [
    group("layout as a string", "layout: expected a Layout such as .*'zigzag'; objects, not strings", layout="zigzag"),
    group("layout as a class", r"layout: .*not the class: Zigzag\(\)", layout=df.Zigzag),
    group("no layout", "layout: expected a Layout such as .*got None", layout=None),
    group("schedule as a string", "schedule: expected a Schedule such as .*objects, not strings", schedule="ring"),
    group("schedule as a class", r"schedule: .*not the class: Ring\(\)", schedule=df.Ring),
    group("kernel as a string", "kernel: expected a kernel such as .*objects, not strings", kernel="triton"),
    group("kernel as a class", r"kernel: .*not the class: Reference\(\)", kernel=df.kernels.Reference),
    group("group as a string", "group: expected a ProcessGroup or a one-dimensional DeviceMesh", group="world"),
    group("group as a number", "group: expected a ProcessGroup .*pass dist.group.WORLD after", group=2),
    group("no group", "group: expected a ProcessGroup or a one-dimensional DeviceMesh", group=None),
    Wrong("cp is a transport",
        lambda cp: df.attention(**tensors(), cp=cp.transport), "cp: expected a ContextParallel or None"),
    Wrong("cp is a string",
        lambda cp: df.attention(**tensors(), cp="cp"), "cp: expected a ContextParallel or None, got 'cp'; make one"),
    Wrong("Triton on CPUs",
        lambda cp: df.attention(**tensors(), cp=remade(cp, kernel=df.kernels.Triton())),
        "kernel: Triton.* does not support this call: .*run on GPUs, not on cpu"),
    Wrong("Hopper on CPUs",
        lambda cp: df.attention(**tensors(), cp=remade(cp, kernel=df.kernels.Hopper())),
        "kernel: Hopper.* does not support this call: .*run on GPUs, not on cpu"),
    Wrong("a mask that wraps around",
        lambda cp: df.attention(**tensors(), mask=Wraps(2**63 - 1), cp=cp),
        "mask: Wraps.*wrapped around at int64's limits"),
    Wrong("a mask that falls",
        lambda cp: df.attention(**tensors(), mask=Falls(), cp=cp), "mask: .*Falls.*numbers that never decrease"),
    Wrong("a layout that loses tokens",
        lambda cp: df.attention(**tensors(), cp=remade(cp, layout=Loses())),
        r"layout: Loses\(\).*hold each of the 8 positions once"),
]  # fmt: skip

METHODS = [
    Wrong("negative length", lambda cp: cp.positions(-1), f"{SEQ_LEN} and at most 2147483647, got -1"),
    Wrong("a float for a length", lambda cp: cp.positions(8.0), f"{SEQ_LEN}, got 8.0"),
    Wrong("a string for a length", lambda cp: cp.seq_local("8"), f"{SEQ_LEN}, got '8'"),
    Wrong("a plan without a mask", lambda cp: cp.plan("causal", 8), "mask: expected a Mask"),
    Wrong("a plan without a length", lambda cp: cp.plan(df.Causal(), None), f"{SEQ_LEN}, got None"),
    Wrong("a plan of other documents",
        lambda cp: cp.plan(df.Documents([0, 9]), 8), "mask: cu_seqlens end at 9 but seq_len is 8"),
    Wrong("positions of a list", lambda cp: cp.positions_of([1, 2], 8), r"x: expected a tensor, got \[1, 2\]"),
    Wrong("positions of a vector",
        lambda cp: cp.positions_of(zeros(4), 8), r"x: expected a tensor \[batch, seq_local, ...\]"),
    Wrong("positions of a whole batch",
        lambda cp: cp.positions_of(zeros(1, 8), 8), r"x: 8 local tokens, but Zigzag\(\) gives"),
    Wrong("positions for a float", lambda cp: cp.positions_of(zeros(1, 4), 8.0), f"{SEQ_LEN}, got 8.0"),
    Wrong("shard a list", lambda cp: cp.shard([1, 2]), "x: expected a tensor, got list"),
    Wrong("shard along no dimension",
        lambda cp: cp.shard(zeros(8)), r"dim: expected one of the 1 dimensions of x \[8\], as an int, got 1"),
    Wrong("shard along a name", lambda cp: cp.shard(zeros(1, 8), "tokens"), "dim: expected one of the 2 dimensions"),
    Wrong("unshard a list", lambda cp: cp.unshard([1, 2]), "x: expected a tensor, got list"),
    Wrong("unshard along no dimension",
        lambda cp: cp.unshard(zeros(1, 4), -3), "dim: expected one of the 2 dimensions"),
    Wrong("unshard other dtypes",
        lambda cp: cp.unshard(zeros(1, 4, dtype=(torch.float32, torch.float16)[cp.rank])),
        ".*disagree about the unshard: dtype differs between rank 0 and rank 1"),
    Wrong("unshard other dimensions",
        lambda cp: cp.unshard(zeros((1, 4, 2)[: 2 + cp.rank])), ".*sizes of x but for dim differs"),
    Wrong("unshard other sizes",
        lambda cp: cp.unshard(zeros(1 + cp.rank, 4)), ".*sizes of x but for dim differs"),
    Wrong("unshard what is no shard",
        lambda cp: cp.unshard(zeros(1, 2 + 2 * cp.rank)),
        r"x: ranks hold \[2, 4\] along dimension 1, but Zigzag\(\) gives"),
]  # fmt: skip


def mean(what: str, words: str, **changes: Any) -> Wrong:
    good = {"loss_sum": zeros(()), "token_count": 3, "reduction": "mean"}
    arguments = {name: value for name, value in (good | changes).items() if value is not LEFT_OUT}
    return Wrong(what, lambda cp: cp.mean(**arguments), words, right=lambda cp: cp.mean(**good))


LEFT_OUT = object()
REDUCTION = (
    "write reduction='mean' where they are averaged .DDP, FSDP2, .*ZeRO., reduction='sum' where they are added up"
)
MEANS = [
    mean("no reduction", f"reduction: is missing; .*{REDUCTION}", reduction=LEFT_OUT),
    mean("reduction of None", f"reduction: is missing; .*{REDUCTION}", reduction=None),
    mean("an unknown reduction",
        f"reduction: expected 'sum' or 'mean', got 'average'; .*{REDUCTION}", reduction="average"),
    mean("an operation for a reduction",
        f"reduction: expected 'sum' or 'mean', got .*{REDUCTION}", reduction=torch.distributed.ReduceOp.AVG),
    mean("losses not summed",
        r"loss_sum: expected a scalar tensor .*got a Tensor of torch.float32 \[3\]; sum the losses", loss_sum=zeros(3)),
    mean("a float for a loss", "loss_sum: expected a scalar tensor", loss_sum=1.0),
    mean("whole losses", "loss_sum: expected a scalar tensor of floating-point dtype", loss_sum=torch.tensor(3)),
    mean("a complex loss", "loss_sum: expected a scalar tensor of floating-point dtype", loss_sum=torch.tensor(3j)),
    mean("a negative count",
        "token_count: expected the number of losses in loss_sum, at least 0, got -3", token_count=-3),
    mean("a count of NaN", "token_count: expected the number of losses", token_count=float("nan")),
    mean("a count as a string", "token_count: expected the number of losses", token_count="3"),
    mean("a count as a bool", "token_count: expected the number of losses", token_count=True),
    mean("labels for a count",
        r"token_count: expected .*got a Tensor of torch.bool \[1, 4\]; .*\(labels != -100\).sum\(\)",
        token_count=torch.ones(1, 4).bool()),
    mean("a learned count", r"token_count: requires a gradient, .*token_count.detach\(\)", token_count=learned()),
]  # fmt: skip


def module(what: str, words: str, *arguments: Any, **options: Any) -> Wrong:
    return making(what, lambda: df.nn.SelfAttention(*arguments, **options), words)


def forward(what: str, words: str, x: Any, **options: Any) -> Wrong:
    return Wrong(what, lambda cp: df.nn.SelfAttention(16, 4, cp=cp)(x, **options), words)


def rope(what: str, words: str, shape: tuple[int, ...], positions: Any) -> Wrong:
    return making(what, lambda: df.nn.RotaryEmbedding(16)(zeros(shape), zeros(shape), positions), words)


MODULES = [
    module("no heads", "heads: expected an int of at least 1, got 0", 16, 0),
    module("heads as a float", "heads: expected an int of at least 1, got 4.0", 16, 4.0),
    module("no kv_heads", "kv_heads: expected an int of at least 1, got 0", 16, 4, 0),
    module("dim as a string", "dim: expected an int of at least 1, got '16'", "16", 4),
    module("heads that do not divide dim", "heads: 4 does not divide dim=10", 10, 4),
    module("kv_heads that do not divide heads", "kv_heads: 3 does not divide heads=4", 16, 4, 3),
    module("an odd head_dim", "head_dim: rotary embedding needs an even head_dim, got 3", 12, 4),
    module("no head_dim", "head_dim: expected an int of at least 1, got 0", 16, 4, head_dim=0),
    module("rope_theta of 0", "rope_theta: expected a positive number such as 10000.0, got 0.0", 16, 4, rope_theta=0.0),
    module("negative rope_theta", "rope_theta: expected a positive number", 16, 4, rope_theta=-1.0),
    module("a module's mask as a string", "mask: expected a Mask .*objects, not strings", 16, 4, mask="causal"),
    module("a module's cp as a string", "cp: expected a ContextParallel or None, got 'cp'", 16, 4, cp="cp"),
    forward("tokens, not embedded",
        "x: expected a floating-point tensor .*got a Tensor of torch.int64", zeros(1, 4, 16).long()),
    forward("without a batch", r"x: expected a floating-point tensor \[batch, seq_local, dim=16\]", zeros(4, 16)),
    forward("of another width", r"x: expected .*dim=16\], got a Tensor of torch.float32 \[1, 4, 8\]", zeros(1, 4, 8)),
    forward("not sharded",
        r"x: 8 local tokens, but Zigzag\(\) gives rank \d of 2 4 of seq_len=8", zeros(1, 8, 16), seq_len=8),
    forward("with a string for a mask", "mask: expected a Mask .*objects, not strings", zeros(1, 4, 16), mask="causal"),
    rope("one position for all",
        r"positions: expected integers \[4\] or \[1, 4\], .*got a Tensor of torch.int64 \[1\]",
        (1, 4, 2, 16), torch.tensor([3])),
    rope("positions as a list", r"positions: expected integers .*got \[0, 1, 2, 3\]", (1, 4, 2, 16), [0, 1, 2, 3]),
    rope("positions of another batch",
        r"positions: expected .*got a Tensor of torch.int64 \[3, 4\]", (2, 4, 2, 16), torch.arange(12).view(3, 4)),
    rope("another head_dim",
        r"q: expected \[batch, tokens, heads, head_dim=16\], got \[1, 4, 2, 8\]", (1, 4, 2, 8), torch.arange(4)),
]  # fmt: skip


def shard_batch(what: str, words: str, **changes: Any) -> Wrong:
    """Of the Transformers integration."""

    def call(cp: df.ContextParallel) -> Any:
        pytest.importorskip("transformers")
        from distflash.integrations.transformers import shard_batch

        return shard_batch({"input_ids": torch.arange(1, 9).view(1, 8)} | changes, cp)

    return Wrong(what, call, words)


def deepspeed(what: str, words: str, call: Callable[[Any, df.ContextParallel], Any]) -> Wrong:
    """Of the DeepSpeed integration."""
    return Wrong(what, lambda cp: call(pytest.importorskip("distflash.integrations.deepspeed"), cp), words)


INTEGRATIONS = [
    Wrong("register no cp",
        lambda cp: pytest.importorskip("distflash.integrations.transformers").register("cp"),
        "cp: expected a ContextParallel, got 'cp'"),
    shard_batch("no input_ids", "batch: has no input_ids, a tensor", input_ids=None),
    shard_batch("one sequence of ids",
        r"input_ids: expected a tensor \[batch, seq_len\], got \[8\]", input_ids=torch.arange(8)),
    shard_batch("padding",
        "attention_mask: has other values than 1; padding", attention_mask=torch.tensor([[1] * 7 + [0]])),
    shard_batch("an unknown name",
        "batch: holds 'pixel_values'; images, video and audio are not supported", pixel_values=zeros(1, 3)),
    shard_batch("labels of another shape",
        r"labels: expected a tensor \[1, 8\], as input_ids, got \[1, 7\]", labels=zeros(1, 7)),
    shard_batch("shifted labels",
        "labels: are the tokens that follow, so shifted already", labels=torch.tensor([[2, 3, 4, 5, 6, 7, 8, -100]])),
    shard_batch("documents that end early",
        "cu_seqlens: ends at 7, but the sequence has 8 tokens", cu_seqlens=[0, 3, 7]),
    shard_batch("positions that jump",
        "position_ids: expected 0, 1, 2, ... that restart at 0", position_ids=torch.arange(1, 9).view(1, 8)),
    deepspeed("an order of dimensions",
        ".*expected batch, tokens and heads to be 0, 1 and 2", lambda dfd, cp: dfd.Order(batch=0, tokens=0)),
    deepspeed("no configuration",
        "config: expected a dict or the path of a JSON file, got 3", lambda dfd, cp: dfd.config.read_config(3)),
    deepspeed("a mask for attention that has one",
        "argument 5: DistributedAttention takes q, k and v alone", lambda dfd,
        cp: dfd.DistributedAttention(cp, df.Causal(), seq_len=8)(*tensors().values(), None, zeros(4, 4))),
    deepspeed("no module to replace",
        "kind: Linear has no Conv1d in it", lambda dfd,
        cp: dfd.replace_attention(nn.Linear(2, 2), nn.Conv1d, dfd.DistributedAttention(cp, df.Causal(), seq_len=8))),
]  # fmt: skip

ROWS = [
    *TENSORS, *NUMBERS, *PER_HEAD, *KEYWORDS, *MASKS_OF_A_CALL, *LENGTHS, *TRANSFORMS,
    *MASKS, *GROUPS, *METHODS, *MEANS, *MODULES, *INTEGRATIONS,
]  # fmt: skip
