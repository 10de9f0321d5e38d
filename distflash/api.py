"""The public API: `ContextParallel` and `attention`.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal, Never, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash import collectives, groups, keywords, lengths, ops, transforms, validation
from distflash.agreement import Agreement
from distflash.call import Calls, Numbers, new_number
from distflash.compiled import NO_DATA, Data, Form, split
from distflash.exact import Exact
from distflash.integers import as_int
from distflash.kernels import Kernel
from distflash.layouts import Layout, Zigzag
from distflash.masks import Full, Mask
from distflash.plan import Plan
from distflash.schedules import Ring, Schedule
from distflash.specification import Tokens
from distflash.transport import Alone, Transport

# In place of Python's own error for a missing argument comes one that says which of the two to pass.
_REQUIRED: Any = None


class ContextParallel:
    """A group of ranks that hold one sequence together.

    Args:
        group: a ``torch.distributed.ProcessGroup`` that this rank belongs to, a ``DeviceMesh`` of one or two
            dimensions (`Ulysses`, `DoubleRing`), or a transport (one rank of a `distflash.transport.Simulator`).
        layout: which tokens each rank holds.
        schedule: in which order the other ranks' keys arrive.
        kernel: None for the best kernel that supports the call; a kernel given is used, or refused with all reasons.
        timeout: seconds, as a number or timedelta, that this rank waits for another one at a time, before all ranks
            raise `RankFailure`; at most the process group's own timeout, which None stands for. Longer than the time by
            which ranks can come apart: compilation, loading data, writing checkpoints. On GPUs, where the host waits
            for nothing, a thread then watches what is queued; without a timeout only NCCL's own watchdog does.
        check_every_call: whether the ranks compare every attention call, forward and backward, before it sends
            anything. A rank that skips a call, or runs the backward of two calls in another order than the others, is
            then told so (if not, the ranks mix up the two calls' keys or gradients). None for the transport's default:
            yes on CPUs; no on GPUs, where a comparison costs a collective and waits for the device, and only calls with
            a new signature are compared. Turn it on there to look for a fault. The same on all ranks.

    Copies of a ContextParallel, as `copy.deepcopy` of a module makes them, are the same object. It cannot be pickled.

    Raises:
        ValueError: an argument is of another kind (a string, a class, a mesh of three dimensions).

    A rank that dies, raises in the middle of a call, or does not come in time ends the calls of all other ranks with
    a `RankFailure`, and every later one at once. See docs/reliability.md.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | Transport,
        layout: Layout = Zigzag(),
        schedule: Schedule = Ring(),
        kernel: Kernel | None = None,
        *,
        timeout: float | timedelta | None = None,
        check_every_call: bool | None = None,
    ) -> None:
        validation.require_layout(layout)
        validation.require_schedule(schedule)
        validation.require_kernel(kernel)
        self.layout = layout
        self.kernel = kernel
        self.transport = groups.guarded(groups.transport_of(group, meshes=True), validation.require_timeout(timeout))
        self.schedule = schedule.on(groups.shape_of(group, self.transport))
        if not (check_every_call is None or isinstance(check_every_call, bool)):
            raise ValueError(f"check_every_call: expected True, False or None, got {check_every_call!r}")
        every_call = self.transport.checks_every_call if check_every_call is None else check_every_call
        self.agreement = Agreement(self.transport, every_call)
        self._calls = Calls(self.transport, layout, self.schedule, kernel, self.agreement)
        # A string, since torch.compile guards the value of strings and may turn ints into symbols.
        self._name = f"context_parallel_{new_number()}"

    @property
    def rank(self) -> int:
        """This rank's place among those that share the sequence."""
        return self.transport.rank

    @property
    def world_size(self) -> int:
        """How many ranks share the sequence."""
        return self.transport.world_size

    @property
    def check_every_call(self) -> bool:
        """Whether the ranks compare every attention call. May be set between two calls, on all ranks alike."""
        return self.agreement.every_call

    @check_every_call.setter
    def check_every_call(self, every_call: bool) -> None:
        self.agreement.every_call = every_call

    def __repr__(self) -> str:
        return (
            f"ContextParallel(rank {self.rank} of {self.world_size}, layout={self.layout!r}, "
            f"schedule={self.schedule!r}, kernel={self.kernel!r})"
        )

    def __copy__(self) -> ContextParallel:
        return self

    def __deepcopy__(self, memo: Any) -> ContextParallel:
        """The same object: a copy of a module (EMA, a reference model) attends over the same ranks."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a ContextParallel cannot be pickled, nor a module that holds one: its process group belongs to this run. "
            "Save module.state_dict(), and load it into a module that was made with the next run's ContextParallel"
        )

    def agree(self, kind: str, **fields: object) -> None:
        """Have all ranks compare ``fields``, and raise on every rank if they differ. All ranks must call.

        For what every rank of the group must have alike before it goes on: a batch, a setting.

        Args:
            kind: what is compared, in words of at most 42 bytes. It stands in the error.
            fields: at most 24 values by name, the same names on every rank: numbers, strings, None, dtypes, tuples and
                dataclasses of these (masks, layouts), and other objects that have a repr.

        Raises:
            ValueError: on every rank, if any two ranks differ, one refuses (`refuse`) or one makes another call. It
                names the ranks, and the fields or the calls that differ.
        """
        self.agreement.require(kind, lambda: fields)

    def refuse(self, problem: str, kind: str = "call", *, in_attention: bool = False) -> NoReturn:
        """Raise ``ValueError(problem)`` on this rank, and a ValueError that names it on the others, who call `agree`.

        Args:
            problem: what is wrong, in words.
            kind: as in `agree`.
            in_attention: whether the others, instead, call `attention`. On GPUs they do not compare calls whose
                signature is known, so they are told only before the first call.
        """
        if in_attention:
            self._calls.refuse(problem)
        self.agreement.refuse(kind, sure=True)
        raise ValueError(problem)

    def seq_local(self, seq_len: int) -> int:
        """How many of ``seq_len`` tokens this rank holds."""
        return self.layout.length(lengths.require_seq_len(seq_len), self.world_size, self.rank)

    def positions(self, seq_len: int, device: torch.device | str | None = None) -> Tensor:
        """The ascending global positions of this rank's tokens, int64 ``[seq_local]``: for RoPE and the like.

        Args:
            seq_len: the global length, at least 0.
            device: by default the group's: the current GPU under NCCL, else the CPU.
        """
        seq_len = lengths.require_seq_len(seq_len)
        positions = self.layout.positions(seq_len, self.world_size, self.rank)
        return positions.to(self.transport.device if device is None else device)

    def positions_of(self, x: Tensor, seq_len: int | None = None, mask: Mask = Full()) -> Tensor:
        """`positions` of the tokens in ``x [batch, seq_local, ...]``: under `torch.compile` a graph for all lengths.

        Args:
            x: this rank's tokens.
            seq_len: the global length. May be left out where all ranks hold equally many tokens or ``mask`` knows it.
            mask: the mask with which the tokens attend.

        Raises:
            ValueError: x does not hold as many tokens as this rank has of ``seq_len``.
        """
        problem = validation.tokens_problem(x)
        problem = problem or (None if seq_len is None else lengths.seq_len_problem(seq_len))
        if problem is not None:
            self.refuse(problem, in_attention=True)
        recipe, data = self._recipe(mask, Numbers())
        return ops.positions(x, _lengths(seq_len, 0, None), recipe, *data)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's slice, along ``dim``, of a tensor that every rank holds whole. Differentiable.

        The length of ``dim`` is the global length and need not divide by anything.

        Raises:
            ValueError: x has no such dimension.
        """
        dim = collectives.dimension(x, dim)
        return collectives.take(x, dim, self.layout.ranges(x.shape[dim], self.world_size, self.rank))

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor from every rank's slice along ``dim``: the inverse of `shard`. All ranks must call.

        Differentiable: its backward sums the ranks' gradients of the whole and returns this rank's slice, which is the
        gradient of the sum of all ranks' losses.

        Raises:
            ValueError: on every rank, if the slices are not what the layout gives each rank.
        """
        return collectives.unshard(x, dim, self.layout, self.agreement)

    def mean(
        self,
        loss_sum: Tensor,
        token_count: Tensor | int,
        *,
        reduction: Literal["sum", "mean"] = _REQUIRED,
        group: dist.ProcessGroup | DeviceMesh | Transport | None = None,
    ) -> Tensor:
        """The mean over all ranks' tokens of a loss that each rank has summed over its own. All ranks must call.

        Args:
            loss_sum: scalar, the sum of this rank's losses.
            token_count: how many losses this rank has summed (tokens that are not ignored); may be 0.
            reduction: must be given. How parameter gradients are combined over the group after backward: "mean" where
                they are averaged, as DDP, FSDP and ZeRO do; "sum" where they are added up, as an all-reduce of your own
                does, or where ranks share no parameter. Either way they come out as the gradient of the value returned;
                with the other one they are off by the number of ranks, which Adam hides.
            group: the ranks whose tokens count and over which gradients are combined, where they are more than those
                that share a sequence: with data parallelism all of data x context, as a process group or a
                one-dimensional mesh. None: the ranks that share the sequence.

        Returns:
            Scalar, the same on every rank of the group; 0 if no rank has a token.

        Raises:
            ValueError: an argument is of another kind, or the group does not hold all ranks that share the sequence.
        """
        everyone = self.transport if group is None else groups.wider_transport(group, self.transport)
        problem = validation.mean_problem(loss_sum, token_count, reduction)
        if problem is not None:
            collectives.refuse_mean(everyone)
            raise ValueError(problem)
        return collectives.mean(loss_sum, token_count, everyone, reduction)

    def plan(
        self,
        mask: Mask,
        seq_len: int,
        device: torch.device | str | None = None,
        *,
        q_start: int = 0,
        q_len: int | None = None,
        kv_layout: Layout | None = None,
    ) -> Plan:
        """What this rank computes, sends and receives in a call. Cached; asks no other rank; printed, it is a table.

        With `Ulysses` it is the inner schedule's plan, whose ranks are the groups that exchange heads; that exchange is
        not in it.

        Args:
            mask: as in `attention`. Under `Rows` all sequences of the batch are one, end to end.
            seq_len: the global number of keys.
            device: where the plan's intervals are; by default the group's.
            q_start, q_len, kv_layout: as in `attention`. Without ``q_len`` queries are all tokens from ``q_start`` on.

        Raises:
            ValueError: an argument is wrong, or queries reach beyond the keys under another mask than `Full`.
        """
        problem = (
            validation.mask_problem(mask)
            or lengths.seq_len_problem(seq_len)
            or lengths.documents_problem(mask, lengths.as_length(seq_len))
            or lengths.queries_problem(q_start, q_len, kv_layout)
        )
        if problem is not None:
            raise ValueError(problem)
        length, start = lengths.as_length(seq_len), lengths.as_length(q_start)
        count = max(0, length - start) if q_len is None else lengths.as_length(q_len)
        problem = lengths.chunk_range_problem(start, count, length, mask)
        problem = problem or lengths.rows_problem(mask, None, length)
        if problem is not None:
            raise ValueError(problem)
        where = torch.device(self.transport.device if device is None else device)
        return self._calls.plan(Exact(mask), Tokens(length, start, count, kv_layout), where)

    def _recipe(self, mask: Mask, numbers: Numbers) -> tuple[int, Data]:
        """The number by which an op finds the call's recipe, and what the op is given beside it."""
        if not torch.compiler.is_compiling():
            return self._calls.recipe(mask, numbers).number, NO_DATA
        form, data = split(mask, numbers.scale, numbers.softcap, numbers.dropout_p, numbers.kv_layout)
        return self._template(self._name, *form), data

    @torch.compiler.assume_constant_result
    def _template(self, name: str, *form: Any) -> int:
        """The number of a template, a constant to `torch.compile`, which guards ``name`` and what the `Form` is of."""
        assert name == self._name
        return self._calls.template(Form(*form)).number


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = Full(),
    cp: ContextParallel | None = None,
    seq_len: int | None = None,
    q_start: int = 0,
    q_len: int | None = None,
    kv_layout: Layout | None = None,
    scale: float | Tensor | None = None,
    softcap: float | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    **unknown: Never,
) -> Any:
    """Exact attention of this rank's queries over the keys of all ranks, softmax(q k^T * scale + mask) v.

    Args:
        q: ``[batch, seq_local, heads, d_qk]``, this rank's tokens in ascending global position
            (`ContextParallel.shard`).
        k: ``[batch, seq_local, kv_heads, d_qk]``; heads is a multiple of kv_heads (GQA, MQA).
        v: ``[batch, seq_local, kv_heads, d_v]``. q, k and v share dtype and device.
        mask: which keys a query sees. Combine with ``&`` and ``|``. Where sequences of the batch differ: `Rows`.
        cp: the group that holds the sequence; None: this device holds all of it.
        seq_len: the global length, of the keys. May be left out where all ranks hold equally many of them or the mask
            knows it.
        q_start, q_len: where queries are not all of the keys' tokens: they are the tokens at positions ``q_start`` to
            ``q_start + q_len``, sharded by the layout of those ``q_len`` alone. Under `Full` they may be any others
            (cross-attention). With ``q_start``, ``q_len`` may be left out where ranks hold equally many queries.
        kv_layout: how keys and values are spread over the ranks, where not by cp's layout.
        scale: multiplies ``q k^T``; ``d_qk ** -0.5`` by default. A real number, which may be a tensor ``[]``; no
            gradient: multiply q by what is learned, and by numbers that differ between heads.
        softcap: scores become ``softcap * tanh(score / softcap)``; None or 0 for none. A real number, no gradient.
        alibi_slopes: ``[heads]``; ``slope * |i - j|`` of global positions is subtracted from the scores
            (https://arxiv.org/abs/2108.12409). No gradient.
        sinks: ``[heads]``, one more logit per head in the softmax's denominator, which has no value. Differentiable:
            each rank's gradient is a part, and the sum over ranks is the gradient.
        dropout_p: must be 0; attention dropout is not supported.
        return_lse: also return the log-sum-exp of the scores. Differentiable.
        unknown: none. Keywords of other attention functions are refused with the way to write them here.

    Returns:
        out ``[batch, seq_local, heads, d_v]`` in q's dtype; with ``return_lse`` also lse
        ``[batch, heads, seq_local]``, float32, natural log. A query that sees no key has out 0, lse -inf and
        gradients 0.

    Raises:
        ValueError: an argument is wrong, no kernel supports the call, ranks disagree, or a transform asks for another
            derivative than a backward pass (forward-mode AD, torch.func.grad); nothing has been computed or sent then.
    """
    cp = _ALONE if cp is None else cp
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp: expected a ContextParallel or None, got {cp!r}; make one of the process group first")
    own_keys = q_len is None and kv_layout is None and as_int(q_start) == 0
    problem = (
        keywords.problem(unknown)
        or transforms.problem(q=q, k=k, v=v, sinks=sinks, scale=scale, softcap=softcap)
        or validation.call_problem(q, k, v, mask, sinks, alibi_slopes, scale, softcap, dropout_p, own_keys)
        or validation.device_problem(q, cp.transport)
        or (None if seq_len is None else lengths.seq_len_problem(seq_len))
        or lengths.queries_problem(q_start, q_len, kv_layout)
    )
    if problem is not None:
        cp.refuse(problem, in_attention=True)
    tokens = _lengths(seq_len, q_start, q_len)
    scale = validation.as_number(scale)
    softcap, dropout_p = ((validation.as_number(x) or 0.0) + 0.0 for x in (softcap, dropout_p))  # -0.0 is 0.0
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks))
    recipe, data = cp._recipe(mask, Numbers(scale, softcap, dropout_p, kv_layout))
    out, lse, _ = ops.attention(q, k, v, sinks, alibi_slopes, tokens, needs_grad, recipe, *data)
    return (out, lse) if return_lse else out


def _lengths(seq_len: int | None, q_start: int, q_len: int | None) -> list[int]:
    """As an op takes them: ints, or symbols while compiling, and -1 for what was left out."""
    return [-1 if length is None else lengths.as_length(length) for length in (seq_len, q_start, q_len)]


# What cp=None stands for. One object, so that its plans and compiled graphs are kept from call to call.
_ALONE = ContextParallel(Alone())
