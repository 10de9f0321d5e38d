"""What is wrong with a call's arguments, in words, found on metadata alone: before any data moves.

[Note: shapes] B batch, T local queries, H query heads, G key/value heads, D head dim of q and k, V head dim of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from math import inf

from torch import Tensor

from distflash.kernels import Kernel, Problem
from distflash.layouts import Layout
from distflash.masks import Mask
from distflash.transport import Transport

# Seconds, some 30 years: what a timedelta and torch's milliseconds can hold.
_LONGEST = 1e9


def tensors_problem(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What is wrong with the shapes, dtypes or devices of q, k and v; None if nothing is."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            return f"{name}: expected a tensor, got {type(x).__name__}"
        if x.dim() != 4:
            expected = "[batch, seq_local, heads, head_dim]"
            return f"{name}: expected four dimensions {expected}, got shape {tuple(x.shape)}"
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            return f"{name}: has dtype {x.dtype} but q has {q.dtype}; cast them to one dtype"
        if x.device != q.device:
            return f"{name}: is on {x.device} but q is on {q.device}; move them to one device"
    return _shapes_problem(q, k, v)


def _shapes_problem(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    order = "; the order of dimensions is [batch, seq_local, heads, head_dim]"
    (B, T, H, D), (_, _, G, _) = q.shape, k.shape
    if k.shape[0] != B or v.shape[0] != B:
        return f"k, v: batch sizes {k.shape[0]} and {v.shape[0]} differ from q's {B}{order}"
    if k.shape[1] != T or v.shape[1] != T:
        return (
            f"k, v: {k.shape[1]} and {v.shape[1]} local tokens differ from q's {T}; this is self-attention, each rank "
            f"holds the keys and values of its own queries' tokens{order}"
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
    scale: float | None,
    softcap: float,
    dropout_p: float,
) -> str | None:
    """What is wrong with a call's arguments, but for their length; None if nothing is."""
    problem = mask_problem(mask) or tensors_problem(q, k, v)
    if problem is not None:
        return problem
    problem = per_head_problem("sinks", sinks, q, grad=True)
    problem = problem or per_head_problem("alibi_slopes", alibi_slopes, q, grad=False)
    return problem or numbers_problem(scale, softcap, dropout_p)


def numbers_problem(scale: float | None, softcap: float, dropout_p: float) -> str | None:
    """What is wrong with the numbers that form scores."""
    # At 0 a masked score would be -inf * 0.
    if scale is not None and not 0 < abs(scale) < inf:
        return f"scale: expected a finite number other than 0, or None for d_qk ** -0.5, got {scale}"
    if not 0 <= softcap < inf:
        return f"softcap: expected a positive number, or None for none, got {softcap}"
    if not 0 <= dropout_p < 1:
        return f"dropout_p: expected a probability of at least 0 and below 1, got {dropout_p}"
    return None


def per_head_problem(name: str, x: Tensor | None, q: Tensor, grad: bool) -> str | None:
    """What is wrong with a tensor of one number per query head (sinks, alibi_slopes)."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return f"{name}: expected a floating-point tensor [heads], got {x!r}"
    if tuple(x.shape) != (q.shape[2],):
        return f"{name}: expected shape [{q.shape[2]}], one per query head, got {list(x.shape)}"
    if x.device != q.device:
        return f"{name}: is on {x.device} but q is on {q.device}"
    if x.requires_grad and not grad:
        return f"{name}: requires a gradient, but none is computed for it; pass {name}.detach()"
    return None


def device_problem(q: Tensor, transport: Transport) -> str | None:
    """Whether the group can send what is on q's device."""
    if transport.world_size == 1 or transport.carries(q.device):
        return None
    return (
        f"q: is on {q.device}, whose tensors this process group cannot send; move q, k and v to "
        f"{transport.device.type}, or make the group with a backend for both (init_process_group without a backend)"
    )


def seq_len_of(q: Tensor, mask: Mask, world_size: int) -> int:
    """The global length where the caller left it out."""
    return q.shape[1] * world_size if mask.seq_len is None else mask.seq_len


def seq_len_problem(seq_len: object) -> str | None:
    """Whether it can be a length at all."""
    return None if isinstance(seq_len, int) else f"seq_len: expected the global length, an int, got {seq_len!r}"


def length_problem(
    name: str, length: int, mask: Mask, seq_len: int, layout: Layout, world_size: int, rank: int
) -> str | None:
    """Whether the ``length`` tokens in argument ``name`` are those that the layout gives this rank of ``seq_len``."""
    if mask.seq_len is not None and mask.seq_len != seq_len:
        return f"mask: cu_seqlens end at {mask.seq_len} but seq_len is {seq_len}; they must end at S"
    expected = layout.length(seq_len, world_size, rank)
    if length != expected:
        return (
            f"{name}: {length} local tokens, but {layout!r} gives rank {rank} of {world_size} {expected} of "
            f"seq_len={seq_len}; shard with cp.shard or cp.positions(seq_len), and pass seq_len where ranks hold "
            "different numbers of tokens"
        )
    return None


def kernel_for(problem: Problem, asked: Kernel | None, known: Sequence[Kernel]) -> Kernel | str:
    """The kernel asked for, or else the first known that takes the problem; or, in words, why there is none."""
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
    """Refuse what is no layout, a name above all."""
    if not isinstance(layout, Layout):
        raise ValueError(f"layout: expected a Layout such as df.Zigzag(), got {layout!r}{_hint(layout)}")


def require_schedule(schedule: object) -> None:
    """Refuse what is no schedule."""
    if not all(callable(getattr(schedule, name, None)) for name in ("steps", "visit", "homecoming")) or isinstance(
        schedule, type
    ):
        raise ValueError(f"schedule: expected a Schedule such as df.Ring(), got {schedule!r}{_hint(schedule)}")


def require_kernel(kernel: object) -> None:
    """Refuse what is neither None nor a kernel."""
    names = ("not_supported_reasons", "forward", "save", "backward")
    if kernel is not None and (isinstance(kernel, type) or not all(callable(getattr(kernel, n, None)) for n in names)):
        raise ValueError(
            f"kernel: expected a kernel such as df.kernels.Triton(), or None for the best that fits, got {kernel!r}"
            f"{_hint(kernel)}"
        )


def require_timeout(timeout: object) -> timedelta | None:
    """A positive number of seconds, or a timedelta, as a timedelta; None as it is."""
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
    """Whether it is a mask at all."""
    if isinstance(mask, Mask):
        return None
    return f"mask: expected a Mask such as df.Causal(), got {mask!r}{_hint(mask)}"


def _hint(value: object) -> str:
    if isinstance(value, str):
        return "; objects, not strings"
    if isinstance(value, type):
        return f"; an object, not the class: {value.__name__}()"
    return ""
