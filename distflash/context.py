"""A group of ranks that hold one sequence together: `ContextParallel`.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash import collectives, groups, lengths, ops, validation, warming
from distflash.agreement import Agreement
from distflash.call import Calls, new_number
from distflash.compiled import NO_DATA, Data, Form, split
from distflash.exact import Exact
from distflash.given import Numbers
from distflash.kernels import Kernel
from distflash.layouts import Layout, Zigzag
from distflash.masks import Full, Mask
from distflash.plan import Plan
from distflash.schedules import Ring, Schedule
from distflash.sharding import Sharding
from distflash.specification import Tokens
from distflash.transport import Alone, Transport

# In place of Python's own error for a missing argument comes one that says which of the two to pass.
_REQUIRED: Any = None


class ContextParallel(Sharding):
    """A group of ranks that hold one sequence together.

    Args:
        group: a ``torch.distributed.ProcessGroup`` that this rank belongs to, a ``DeviceMesh`` of one or two
            dimensions (`Ulysses`, `DoubleRing`), or a transport (one rank of a `distflash.transport.Simulator`).
            None is refused; torch's types say that ``dist.group.WORLD`` may be it.
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

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.Zigzag(), schedule=df.Ring())
        >>> cp
        ContextParallel(rank 0 of 2, layout=Zigzag(), schedule=Ring(), kernel=None)
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | Transport | None,
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
        self.calls = Calls(self.transport, layout, self.schedule, kernel, self.agreement)
        # A string, since torch.compile guards the value of strings and may turn ints into symbols.
        self._name = f"context_parallel_{new_number()}"

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

    def with_mask(self, mask: Mask) -> ContextParallel:
        """The same group with its layout for a batch that is attended to under ``mask``: see `Balanced`.

        Takes no time, and asks no other rank. Shard the batch, take positions and attend with what is returned; other
        layouts than `Balanced` are the same for all masks. Layers with other masks take it, too: what counts is that
        tokens and calls have one layout.

        Raises:
            ValueError: mask is none.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD, layout=df.Balanced(chunk=1))
            >>> mask = df.Causal() & df.Documents([0, 3, 8])
            >>> cp.with_mask(mask).positions(8)
            tensor([0, 1, 2, 7])
        """
        if (problem := validation.mask_problem(mask)) is not None:
            raise ValueError(problem)
        return self.with_layout(self.layout.under(mask))

    def with_layout(self, layout: Layout) -> ContextParallel:
        """The same group with another layout.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.with_layout(df.Contiguous()).positions(8)
            tensor([0, 1, 2, 3])
        """
        if layout is self.layout or layout == self.layout:  # a copy, as one that a data loader's worker has made
            return self
        validation.require_layout(layout)
        other = object.__new__(ContextParallel)
        other.__dict__.update(self.__dict__, layout=layout)
        return other

    def warm_up(
        self,
        q_shape: Sequence[int],
        k_shape: Sequence[int],
        v_shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        mask: Mask = Full(),
        *,
        seq_len: int | None = None,
        needs_grad: bool = True,
    ) -> None:
        """Compile what a call of `attention` with such tensors launches, in several processes. Nothing is sent.

        Otherwise the first call compiles one kernel after the other. The processes are forked from this one: call it
        early, before threads and GPU memory are in use. Where no kernel is compiled (on CPUs), or all have been, it
        returns at once.

        Args:
            q_shape, k_shape, v_shape: of this rank's tensors, see `attention`; v_shape is k_shape by default.
            dtype, mask, seq_len: as in the call.
            needs_grad: whether a backward may follow.

        Raises:
            ValueError: `attention` would refuse such a call.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.warm_up((1, 32, 8, 64), (1, 32, 2, 64), mask=df.Causal())
        """
        shapes = warming.Shapes(tuple(q_shape), tuple(k_shape), tuple(k_shape if v_shape is None else v_shape))
        layout = None if self.layout is self.calls.layout else self.layout
        asked = warming.specification_of(self.calls, shapes, dtype, mask, seq_len, needs_grad, layout)
        warming.Warming().before(self.calls, asked, self.calls.prepare(asked).kernel)

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

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.agree("batch", seq_len=4096, mask=df.Causal())
            >>> cp.agree("batch", seq_len=4096 + cp.rank)
            Traceback (most recent call last):
                ...
            ValueError: the ranks of this context-parallel group disagree about the batch: seq_len is 4096 ...
        """
        self.agreement.require(kind, lambda: fields)

    def refuse(self, problem: str, kind: str = "call", *, in_attention: bool = False) -> NoReturn:
        """Raise ``ValueError(problem)`` on this rank, and a ValueError that names it on the others, who call `agree`.

        Args:
            problem: what is wrong, in words.
            kind: as in `agree`.
            in_attention: whether the others, instead, call `attention`. On GPUs they do not compare calls whose
                signature is known, so they are told only before the first call.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.refuse("batch: holds no labels", "batch")
            Traceback (most recent call last):
                ...
            ValueError: batch: holds no labels
        """
        if in_attention:
            self.calls.refuse(problem)
        self.agreement.refuse(kind, sure=True)
        raise ValueError(problem)

    def seq_local(self, seq_len: int) -> int:
        """How many of ``seq_len`` tokens this rank holds.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.seq_local(11)
            5
        """
        return self.layout.length(lengths.require_seq_len(seq_len), self.world_size, self.rank)

    def positions(self, seq_len: int, device: torch.device | str | None = None) -> Tensor:
        """The ascending global positions of this rank's tokens, int64 ``[seq_local]``: for RoPE and the like.

        Args:
            seq_len: the global length, at least 0.
            device: by default the group's: the current GPU under NCCL, else the CPU.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.positions(10)
            tensor([0, 1, 7, 8, 9])
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

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.positions_of(torch.randn(1, 4, 64))
            tensor([0, 1, 6, 7])
        """
        problem = validation.tokens_problem(x)
        problem = problem or (None if seq_len is None else lengths.seq_len_problem(seq_len))
        if problem is not None:
            self.refuse(problem, in_attention=True)
        recipe, data = self.recipe(mask, Numbers())
        return ops.positions(x, as_given(seq_len, 0, None), recipe, *data)

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

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> losses = cp.shard(torch.arange(5.0), dim=0)  # of this rank's tokens
            >>> cp.mean(losses.sum(), losses.numel(), reduction="mean")
            tensor(2.)
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

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> print(cp.plan(df.Causal() & df.Window(15), seq_len=64))
            Plan of rank 0 of 2: 392 allowed pairs
            percent of all pairs, by rank: 43.4, 56.6
            keys of others, by rank: 15, 15; times the bytes of a token's k and v
            forward    computes                           meanwhile
              stage 0  keys of 0[0:32]: 272 pairs, first  receive keys of 1 (15) from 1
                                                          send keys of 0 (15) to 1
              stage 1  keys of 1[0:15]: 120 pairs, last   -
            backward   computes                           meanwhile
              stage 0  keys of 0[0:32]: 272 pairs, first  receive keys of 1 (15) from 1
                                                          send keys of 0 (15) to 1
              stage 1  keys of 1[0:15]: 120 pairs, last   -
              stage 2  -                                  send dK, dV of 1 (15) to 1
                                                          receive dK, dV of 0 (15) from 1
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
        problem = self.layout.refusal(count) or (kv_layout or self.layout).refusal(length)
        if problem is not None:
            raise ValueError(problem)
        return self.calls.plan(Exact(mask), Tokens(length, start, count, kv_layout, self._of_batch), where)

    @property
    def _of_batch(self) -> Layout | None:
        """The layout, where it is not that of the group."""
        return None if self.layout is self.calls.layout else self.layout

    def recipe(self, mask: Mask, numbers: Numbers) -> tuple[int, Data]:
        """The number by which an op finds the call's recipe, and what the op is given beside it."""
        if not torch.compiler.is_compiling():
            if self.layout is not self.calls.layout:
                numbers = replace(numbers, layout=self.layout)
            return self.calls.recipe(mask, numbers).number, NO_DATA
        form, data = split(mask, numbers.scale, numbers.softcap, numbers.dropout_p, numbers.kv_layout, self._of_batch)
        return self._template(self._name, *form), data

    @torch.compiler.assume_constant_result
    def _template(self, name: str, *form: Any) -> int:
        """The number of a template, a constant to `torch.compile`, which guards ``name`` and what the `Form` is of."""
        assert name == self._name
        return self.calls.template(Form(*form)).number


def as_given(seq_len: int | None, q_start: int, q_len: int | None) -> list[int]:
    """As an op takes them: ints, or symbols while compiling, and -1 for what was left out."""
    return [-1 if length is None else lengths.as_length(length) for length in (seq_len, q_start, q_len)]


# What cp=None stands for. One object, so that its plans and compiled graphs are kept from call to call.
ALONE = ContextParallel(Alone())
