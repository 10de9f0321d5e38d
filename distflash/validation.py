"""Checks of a call's arguments. They read metadata only, and return the error message or None.

[Note: shapes] B batch, T local queries, H query heads, G key/value heads, D head dim of q and k, V head dim of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from math import inf
from numbers import Real

import torch
from torch import Tensor

from distflash.dropout import fits_int64
from distflash.kernels import Hopper, Kernel, Problem
from distflash.layouts import Layout
from distflash.mask_algebra import Mask
from distflash.schedules import Reproducible, Ring, Schedule
from distflash.transport import Transport

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ORDER = "[batch, seq_local, heads, head_dim]"
# Bounds of a scale in float32, in which kernels compute.
SMALLEST, LARGEST = (float(n) for n in (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max))
# Seconds: 30 years, which fits a timedelta and torch's milliseconds.
_LONGEST = 1e9


def tensors_problem(q: Tensor, k: Tensor, v: Tensor, self_attention: bool = True) -> str | None:
    """Check the types, shapes, dtypes and devices of q, k and v.

    self_attention: whether q, k and v are of the same tokens.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (problem := _kind_problem(name, x)) is not None:
            return problem
        if x.dim() != 4:
            return f"{name}: expected four dimensions {ORDER}, got shape {tuple(x.shape)}"
    if q.dtype not in DTYPES:
        return f"q: expected float16, bfloat16, float32 or float64, got {q.dtype}; cast it, with q.bfloat16() say"
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            return f"{name}: has dtype {x.dtype} but q has {q.dtype}; cast them to one dtype"
        if x.device != q.device:
            return f"{name}: is on {x.device} but q is on {q.device}; move them to one device"
    return _shapes_problem(q, k, v, self_attention)


def _kind_problem(name: str, x: object) -> str | None:
    """Check that it is a dense, strided, local tensor."""
    if not isinstance(x, Tensor):
        return f"{name}: expected a tensor, got {came(x)}"
    if _is_distributed(x):
        return f"{name}: is a DTensor; pass this rank's part of it, {name}.to_local(), or {name}.full_tensor()"
    if x.is_nested:
        return f"{name}: is a nested tensor; pack its sequences into one, and say where they end by df.Documents"
    if x.layout != torch.strided:
        return f"{name}: has layout {x.layout}; pass a dense tensor, {name}.to_dense()"
    return None


def _is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, without importing its module, which is slow."""
    return hasattr(x, "to_local") and hasattr(x, "device_mesh")


def came(value: object) -> str:
    """A short description of a wrong argument. Tensors are neither printed nor copied from a GPU."""
    is_number = isinstance(value, Tensor) and value.is_cpu and not value.dim()
    if not is_number and hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, Real):
        return f"a {type(value).__name__} of {value.dtype} {list(value.shape)}"  # type: ignore[attr-defined]
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:80]} ... ({type(value).__name__})"


def _shapes_problem(q: Tensor, k: Tensor, v: Tensor, self_attention: bool) -> str | None:
    order = f"; the order of dimensions is {ORDER}"
    (B, T, H, D), (_, _, G, _) = q.shape, k.shape
    if (
        self_attention
        and k.shape[1] == v.shape[1] != T
        and k.shape[2] == v.shape[2] == H
        and k.shape[1]
        and T % k.shape[1] == 0
    ):
        # With dimensions 1 and 2 swapped the shapes would be valid.
        return (
            f"q, k, v: look heads-first, [batch, heads, seq_local, head_dim], with {T} query heads, {k.shape[1]} "
            f"key/value heads and {H} tokens; pass q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2){order}"
        )
    if k.shape[0] != B or v.shape[0] != B:
        return f"k, v: batch sizes {k.shape[0]} and {v.shape[0]} differ from q's {B}{order}"
    if not self_attention and k.shape[1] != v.shape[1]:
        return f"v: {v.shape[1]} local tokens differ from k's {k.shape[1]}{order}"
    if self_attention and (k.shape[1] != T or v.shape[1] != T):
        return (
            f"k, v: {k.shape[1]} and {v.shape[1]} local tokens differ from q's {T}; this is self-attention, each rank "
            f"holds the keys and values of its own queries' tokens (for other queries pass q_start and q_len){order}"
        )
    if v.shape[2] != G:
        return f"v: {v.shape[2]} heads differ from k's {G}{order}"
    if k.shape[3] != D:
        return f"k: head_dim {k.shape[3]} differs from q's {D}{order}"
    if not H or not G or H % G:
        return (
            f"q, k: {H} query heads are not a multiple of {G} key/value heads; query head h reads key head "
            f"h // (heads // kv_heads){order}"
        )
    if not D or not v.shape[3]:
        return f"q, v: head dims {D} and {v.shape[3]} must be at least 1"
    return None


def call_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | Tensor | None,
    softcap: float | Tensor | None,
    dropout_p: float,
    self_attention: bool,
    dropout_seed: int | Tensor | None = None,
) -> str | None:
    """Check all arguments of a call, except lengths."""
    problem = mask_problem(mask) or tensors_problem(q, k, v, self_attention)
    if problem is not None:
        return problem
    problem = per_head_problem("sinks", sinks, q, grad=True)
    problem = problem or per_head_problem("alibi_slopes", alibi_slopes, q, grad=False)
    problem = problem or numbers_problem(scale, softcap, dropout_p)
    if problem is None and (dropout_p or dropout_seed is not None):
        problem = seed_problem(dropout_p, dropout_seed, q)
    return problem


def seed_problem(dropout_p: float, seed: object, q: Tensor) -> str | None:
    """What is wrong with the seed of dropout."""
    remedy = "pass an int, or an int64 tensor [] on q's device: the same on all ranks, and new in each call and step"
    if seed is None:
        return f"dropout_seed: is missing, but dropout_p is {came(dropout_p)}; {remedy}"
    if not isinstance(seed, Tensor):
        if fits_int64(seed):
            return None
        return f"dropout_seed: expected an int that fits int64, got {came(seed)}; {remedy}"
    if (problem := _kind_problem("dropout_seed", seed)) is not None:
        return problem
    if seed.dtype != torch.int64 or seed.dim() != 0:
        return f"dropout_seed: expected an int64 tensor [], got {came(seed)}; {remedy}"
    if seed.device != q.device:
        return f"dropout_seed: is on {seed.device} but q is on {q.device}; move it to q's device, or pass an int"
    return None


def numbers_problem(scale: object, softcap: object, dropout_p: object) -> str | None:
    """Check the numbers that form scores."""
    problem = _real_problem("scale", scale, "multiply q by it instead, and pass scale=1.0")
    problem = problem or _real_problem("softcap", softcap, "softcap is not differentiable here; pass float(softcap)")
    problem = problem or _real_problem("dropout_p", dropout_p, "one probability is for all heads")
    if problem is not None:
        return problem
    # A scale of 0 would make masked scores -inf * 0.
    if scale is not None and not SMALLEST <= abs(_as_float(scale)) <= LARGEST:
        return (
            f"scale: expected a finite number other than 0 (in float32), or None for d_qk ** -0.5, got {came(scale)}; "
            "where scores are scaled already, pass scale=1.0"
        )
    if softcap is not None and _as_float(softcap) != 0 and not SMALLEST <= _as_float(softcap) <= LARGEST:
        return f"softcap: expected a positive number (in float32), or None for none, got {came(softcap)}"
    if dropout_p is None or not 0 <= _as_float(dropout_p) < 1:
        return f"dropout_p: expected a probability of at least 0 and below 1, got {came(dropout_p)}"
    return None


def _real_problem(name: str, value: object, remedy: str) -> str | None:
    """Check that ``value`` is None or a real number, without a gradient that would be lost."""
    if value is None or isinstance(value, float):
        return None
    if isinstance(value, Tensor):
        if value.requires_grad:
            return f"{name}: requires a gradient, which would be dropped; {remedy}, or {name}.detach() for a constant"
        real = value.is_floating_point() or value.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
        if real and value.dim() == 0 and not value.is_meta and not _is_distributed(value):
            return None
    elif isinstance(value, Real) and not isinstance(value, bool):
        return None
    return f"{name}: expected one real number for all heads, got {came(value)}; {remedy}"


def _as_float(value: object) -> float:
    if isinstance(value, float):
        return value
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return inf


def as_number(value: float | Tensor | None) -> float | None:
    """A number that has passed `numbers_problem`, as a Python float."""
    return None if value is None else _as_float(value)


def per_head_problem(name: str, x: Tensor | None, q: Tensor, grad: bool) -> str | None:
    """Check a tensor with one number per query head (sinks, alibi_slopes)."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        return f"{name}: expected a floating-point tensor [heads], got {came(x)}"
    if (problem := _kind_problem(name, x)) is not None:
        return problem
    if tuple(x.shape) != (q.shape[2],):
        return f"{name}: expected shape [{q.shape[2]}], one per query head, got {list(x.shape)}"
    if x.device != q.device:
        return f"{name}: is on {x.device} but q is on {q.device}; move it to q's device"
    if x.requires_grad and not grad:
        return f"{name}: requires a gradient, but none is computed for it; pass {name}.detach()"
    return None


def device_problem(q: Tensor, transport: Transport) -> str | None:
    """Check that the group can send tensors on q's device."""
    if transport.world_size == 1:
        return None
    if q.is_meta:
        return "q: is on meta and holds no data to send; pass cp=None to find out shapes"
    if q.is_cuda and transport.device.type == "cuda" and q.device != transport.device:
        return (
            f"q: is on {q.device}, but this process group sends from {transport.device}; call torch.cuda.set_device "
            "with this rank's GPU before the ContextParallel is made, and put q, k and v there"
        )
    if transport.supports_device(q.device):
        return None
    return (
        f"q: is on {q.device}, whose tensors this process group cannot send; move q, k and v to "
        f"{transport.device.type}, or make the group with a backend for both (init_process_group without a backend)"
    )


def tokens_problem(x: object) -> str | None:
    """Check that it is a tensor ``[batch, tokens, ...]``."""
    if (problem := _kind_problem("x", x)) is not None:
        return problem
    assert isinstance(x, Tensor)
    return None if x.dim() >= 2 else f"x: expected a tensor [batch, seq_local, ...], got shape {tuple(x.shape)}"


def mean_problem(loss_sum: object, token_count: object, reduction: object) -> str | None:
    """Check the arguments of `ContextParallel.mean`."""
    if not isinstance(reduction, str) or reduction not in ("sum", "mean"):
        given = "is missing" if reduction is None else f"expected 'sum' or 'mean', got {came(reduction)}"
        return (
            f"reduction: {given}; it says how gradients of parameters are combined over these ranks after backward: "
            "write reduction='mean' where they are averaged (DDP, FSDP2, FSDP, DeepSpeed ZeRO), reduction='sum' where "
            "they are added up (all_reduce of p.grad by hand) or where no parameter is shared"
        )
    if not isinstance(loss_sum, Tensor) or loss_sum.dim() != 0 or not loss_sum.is_floating_point():
        return (
            f"loss_sum: expected a scalar tensor of floating-point dtype, got {came(loss_sum)}; "
            "sum the losses of this rank's tokens first"
        )
    if isinstance(token_count, Tensor):
        fine = token_count.numel() == 1 and not token_count.is_complex() and not token_count.is_meta
        if fine and token_count.requires_grad:
            return "token_count: requires a gradient, which would be dropped; pass token_count.detach()"
    else:
        real = isinstance(token_count, Real) and not isinstance(token_count, bool)
        fine = real and 0 <= _as_float(token_count) < inf
    if fine:
        return None
    return (
        f"token_count: expected the number of losses in loss_sum, at least 0, got {came(token_count)}; "
        "with ignored labels it is (labels != -100).sum()"
    )


def kernel_for(problem: Problem, asked: Kernel | None, known: Sequence[Kernel], repeats: bool = False) -> Kernel | str:
    """The kernel that the user passed, else the first in ``known`` that supports the problem; or the error message.

    repeats: whether the same bits are required in every run.
    """
    if repeats and isinstance(asked, Hopper) and not asked.deterministic:
        return (
            f"kernel: {asked!r} adds up dQ in another order in every run, and its bits are to be reproducible; take "
            "df.kernels.Hopper(deterministic=True), or kernel=None"
        )
    if asked is not None:
        reasons = asked.not_supported_reasons(problem)
        return f"kernel: {asked!r} does not support this call: " + "; ".join(reasons) if reasons else asked
    refusals = []
    for kernel in known:
        reasons = kernel.not_supported_reasons(problem)
        if not reasons:
            return kernel
        refusals.append(f"{kernel!r}: " + "; ".join(reasons))
    return "no kernel supports this call. " + ". ".join(refusals)


def require_layout(layout: object) -> None:
    """Raise a ValueError unless it is a layout."""
    if not isinstance(layout, Layout):
        raise ValueError(f"layout: expected a Layout such as df.Zigzag(), got {came(layout)}{hint(layout)}")


def require_schedule(schedule: object) -> None:
    """Raise a ValueError unless it is a schedule."""
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule: expected a Schedule such as df.Ring(), got {came(schedule)}{hint(schedule)}")


def schedule_of(schedule: Schedule, reproducible: object) -> Schedule:
    """The schedule of a `ContextParallel`; ``reproducible=True`` is short for `Reproducible`."""
    require_schedule(schedule)
    if not isinstance(reproducible, bool):
        raise ValueError(
            f"reproducible: expected True or False, got {came(reproducible)}; a chunk other than of "
            f"{Reproducible().chunk} tokens is given by schedule=df.Reproducible(chunk)"
        )
    if not reproducible or schedule.reproducible:
        return schedule
    if schedule != Ring():
        raise ValueError(
            f"reproducible: True stands for schedule=df.Reproducible(), but schedule={schedule!r} is given, too, under "
            "which bits depend on the number of ranks; leave one of the two out"
        )
    return Reproducible()


def require_kernel(kernel: object) -> None:
    """Raise a ValueError unless it is None or a kernel."""
    if kernel is not None and not isinstance(kernel, Kernel):
        raise ValueError(
            f"kernel: expected a kernel such as df.kernels.Triton(), or None for the best that fits, got {came(kernel)}"
            f"{hint(kernel)}"
        )


def require_timeout(timeout: object) -> timedelta | None:
    """A timeout, given as seconds or a timedelta, as a timedelta; None stays None. Else a ValueError."""
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.001 <= seconds < _LONGEST:
        raise ValueError(
            "timeout: expected a positive number of seconds, a positive datetime.timedelta, or None for the process "
            f"group's own, got {timeout!r}"
        )
    return timedelta(seconds=float(seconds))


def mask_problem(mask: object) -> str | None:
    """Check that it is a mask."""
    if isinstance(mask, Mask):
        return None
    return f"mask: expected a Mask such as df.Causal(), got {came(mask)}{hint(mask) or _mask_hint(mask)}"


def _mask_hint(mask: object) -> str:
    if mask is None or isinstance(mask, bool):
        return "; a causal mask is df.Causal(), and none is df.Full()"
    if isinstance(mask, tuple | list):
        return "; combine masks with & or |, as in df.Causal() & df.Window(1023)"
    if isinstance(mask, int):
        return "; a causal window of w keys is df.Window(w - 1)"
    return (
        "; masks are objects, which every rank can evaluate at its own positions: df.Causal(), df.Window(left, right), "
        "df.Documents(cu_seqlens), df.PrefixLM(length), df.Chunked(size) and others (docs/masks.md), combined with & "
        "and |; a rule of your own is a subclass of df.Mask with `ends`"
    )


def hint(value: object) -> str:
    """A hint for strings and classes that were passed in place of an object; else empty."""
    if isinstance(value, str):
        return "; objects, not strings"
    if isinstance(value, type):
        return f"; an object, not the class: {value.__name__}()"
    return ""


def captured_seed_problem(q: Tensor, seed: int | Tensor) -> str | None:
    """An int as the seed of a call in a CUDA graph, which would have it in every replay."""
    if isinstance(seed, Tensor) or torch.compiler.is_compiling() or not q.is_cuda:
        return None
    if not torch.cuda.is_current_stream_capturing():
        return None
    return (
        f"dropout_seed: the int {seed} would be the same in every replay of this CUDA graph; pass an int64 tensor [] "
        "on q's device, and fill it before each replay"
    )
