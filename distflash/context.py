"""A group of ranks that hold one sequence together: `ContextParallel`.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash import groups, lengths, ops, validation, warming
from distflash.agreement import Agreement
from distflash.call import Calls, new_number
from distflash.compiled import NO_DATA, Data, Form, split
from distflash.exact import ByValue
from distflash.given import Options
from distflash.kernels import Kernel
from distflash.layouts import Layout, Zigzag
from distflash.mask_algebra import Mask
from distflash.masks import Full
from distflash.plan import Plan
from distflash.repeats import Repeats
from distflash.schedules import Ring, Schedule
from distflash.sharding import Sharding
from distflash.specification import CallTokens
from distflash.transport import Alone, Transport


class ContextParallel(Sharding):
    """A group of ranks that hold one sequence together.

    Args:
        group: a ``torch.distributed.ProcessGroup`` that this rank belongs to, a ``DeviceMesh`` of one
            dimension, or of two for `Ulysses` and `DoubleRing`, or a transport (one rank of a
            `distflash.transport.Simulator`). ``None`` is refused: the type allows it only
            because torch types ``dist.group.WORLD`` as Optional.
        layout: which tokens each rank holds.
        schedule: the context-parallel algorithm: what ranks send to each other, and when.
        kernel: None for the fastest kernel that supports the call. If one is given, it is used, or the call raises with
            all reasons why it cannot be.
        timeout: how long this rank waits for another rank before all ranks raise `RankFailure`: seconds or a timedelta,
            at most the process group's own timeout. It must exceed the largest delay between ranks (compilation,
            loading data, writing checkpoints). On GPUs, where messages are asynchronous, a watchdog thread of ours
            enforces it. None (the default): the process group's own timeout, which on GPUs NCCL's watchdog enforces.
        check_every_call: whether the ranks compare every attention call, forward and backward, before it sends
            anything. Then a rank that skips a call, or runs two backward passes in another order than the other ranks,
            gets an error; otherwise keys or gradients of different calls would be mixed. The same on all ranks. None
            for the default: yes on CPUs; on GPUs, where a comparison costs a collective and a synchronisation, only
            calls with a new signature are compared. Turn it on there to find a fault.
        reproducible: whether results have the same bits on any number of ranks, for debugging: short for
            ``schedule=Reproducible()``, whose docstring says what it takes and costs.

    Copies of a ContextParallel, as `copy.deepcopy` of a module makes them, are the same object. It cannot be pickled.

    Raises:
        ValueError: an argument has the wrong type (a string, a class, a mesh of three dimensions).

    If a rank dies, raises in the middle of a call, or exceeds the timeout, the calls of all other ranks raise
    `RankFailure`, and so does every later call at once. See docs/reliability.md.

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
        reproducible: bool = False,
    ) -> None:
        validation.require_layout(layout)
        schedule = validation.schedule_of(schedule, reproducible)
        validation.require_kernel(kernel)
        self.layout = layout
        self.kernel = kernel
        self.transport = groups.guarded(groups.transport_of(group, meshes=True), validation.require_timeout(timeout))
        warming.prepare_for(self.transport.device)
        # Ulysses and DoubleRing take their sizes from the shape of a mesh, if the group is one.
        self.schedule = schedule.on(groups.shape_of(group, self.transport))
        if not (check_every_call is None or isinstance(check_every_call, bool)):
            raise ValueError(f"check_every_call: expected True, False or None, got {check_every_call!r}")
        every_call = self.transport.verifies_every_call if check_every_call is None else check_every_call
        self.agreement = Agreement(self.transport, every_call)
        self.calls = Calls(self.transport, layout, self.schedule, kernel, self.agreement)
        # What was prepared for earlier calls, so that a call like one of them is not checked again.
        self.repeats: Repeats = {}
        # Tells torch.compile which group a graph was made for, see `_template`. A string, since an int may become a
        # symbol.
        self._name = f"context_parallel_{new_number()}"

    @property
    def check_every_call(self) -> bool:
        """Whether the ranks compare every attention call. May be set between calls, to the same value on all ranks."""
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
        """The same group, with its layout for ``mask``. Of the layouts, only `Balanced` depends on masks.

        It takes no time and communicates nothing. Use what it returns to shard the batch, for positions and for
        attention. Layers with other masks use the same object: all attention calls on a batch must use the layout by
        which the batch was sharded.

        Raises:
            ValueError: mask is not a Mask.

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
        if layout is self.layout or layout == self.layout:
            # A layout that came with a batch from a data loader's worker is an equal copy, not the same object.
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
        dropout_p: float = 0.0,
        return_max_logits: bool = False,
    ) -> None:
        """Compile the kernels that `attention` launches for such tensors, in parallel processes. Nothing is sent.

        Otherwise the first call compiles one kernel after the other. The processes are forked from this one, so call it
        early, before threads and GPU memory are in use. It returns at once if no kernel needs compilation (on CPUs) or
        all have been compiled.

        Args:
            q_shape, k_shape, v_shape: of this rank's tensors, see `attention`; v_shape is k_shape by default.
            dtype, mask, seq_len, dropout_p, return_max_logits: as in the call.
            needs_grad: whether to compile the backward kernels as well.

        Raises:
            ValueError: `attention` would raise for such a call.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.warm_up((1, 32, 8, 64), (1, 32, 2, 64), mask=df.Causal())
        """
        shapes = warming.Shapes(tuple(q_shape), tuple(k_shape), tuple(k_shape if v_shape is None else v_shape))
        layout = None if self.layout is self.calls.layout else self.layout
        asked = warming.specification_of(
            self.calls, shapes, dtype, mask, seq_len, needs_grad, layout, dropout_p, return_max_logits
        )
        warming.compile_for(self.calls, asked, self.calls.prepare(asked).kernel)

    def agree(self, kind: str, **fields: object) -> None:
        """Compare ``fields`` over all ranks, and raise on every rank if they differ. All ranks must call it.

        For values that every rank of the group must have before it continues, such as a batch or a setting.

        Args:
            kind: what is compared, for the error message: a text of at most 42 bytes.
            fields: at most 24 values by name, the same names on every rank: numbers, strings, None, dtypes, tuples and
                dataclasses of these (masks, layouts), and other objects that have a repr.

        Raises:
            ValueError: on every rank, if two ranks differ, a rank calls `refuse`, or a rank makes a different call. It
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
        """Raise ``ValueError(problem)`` on this rank. Ranks that call `agree` raise a ValueError that names this rank.

        Args:
            problem: what is wrong, in words.
            kind: as in `agree`.
            in_attention: whether the other ranks call `attention` instead of `agree`. With `check_every_call`, the
                default on CPUs, they compare every call, so they raise, too. Without `check_every_call` they compare
                only calls whose signature is new. Before the first call every signature is new, so they raise, too.
                After it, this rank cannot know whether the signature of their call is new, so it sends nothing: it
                raises alone, and they wait for it until the timeout.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> cp.refuse("batch: holds no labels", "batch")
            Traceback (most recent call last):
                ...
            ValueError: batch: holds no labels
        """
        if in_attention:
            self.calls.refuse(problem)
        self.agreement.refuse(kind, others_compare=True)
        raise ValueError(problem)

    def positions_of(self, x: Tensor, seq_len: int | None = None, mask: Mask = Full()) -> Tensor:
        """The `positions` of the tokens in ``x [batch, seq_local, ...]``, traced with dynamic lengths: torch.compile
        does not recompile per length.

        Args:
            x: this rank's tokens.
            seq_len: the global length. May be left out if all ranks hold equally many tokens, or if ``mask`` has a
                length, as `Documents` does.
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
        recipe, data = self.recipe(mask, Options())
        return ops.positions(x, lengths.as_given(seq_len, 0, None), recipe, *data)

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
        """What this rank computes, sends and receives in a call; prints as a table. Cached; communicates nothing.

        In the table, ``keys of 1[0:15]`` are the first 15 of the keys received from rank 1, and ``(15)`` counts tokens.
        *first* and *last* mark the kernel calls that begin and end the softmax of their queries (in backward, the sum
        of their dQ).

        With `Ulysses`: the inner schedule's plan, in which a "rank" is one all-to-all group. The all-to-all is not
        shown.

        Args:
            mask: as in `attention`. With `Rows`, the sequences of the batch are concatenated to one.
            seq_len: the global number of keys.
            device: of the plan's intervals, which say what keys each query sees; by default the group's device.
            q_start, q_len, kv_layout: as in `attention`. Without ``q_len``: all tokens from ``q_start`` on.

        Raises:
            ValueError: an argument is wrong, or queries reach beyond the last key under a mask other than `Full`.

        Examples:
            >>> cp = df.ContextParallel(dist.group.WORLD)
            >>> print(cp.plan(df.Causal() & df.Window(15), seq_len=64))
            Plan of rank 0 of 2: 392 allowed pairs
            percent of all pairs, by rank: 43.4, 56.6
            remote keys, by rank: 15, 15 (each: k and v of one token)
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
        # A mask of the same value has the same plan, even if it is another object.
        return self.calls.plan(ByValue(mask), CallTokens(length, start, count, kv_layout, self._of_batch), where)

    @property
    def _of_batch(self) -> Layout | None:
        """The layout set by `with_layout` or `with_mask`; None if it is the group's own."""
        return None if self.layout is self.calls.layout else self.layout

    def recipe(self, mask: Mask, options: Options) -> tuple[int, Data]:
        """The id of the call's `Recipe` (everything but its tensors), an int that the custom op takes.

        Under torch.compile: the id of a `Template`, the constant part of the call, and its `Data`, the part that is
        graph inputs. Together they make a `Recipe`.
        """
        if not torch.compiler.is_compiling():
            if self.layout is not self.calls.layout:
                options = replace(options, layout=self.layout)
            return self.calls.recipe(mask, options).number, NO_DATA
        layouts = options.kv_layout, self._of_batch
        form, data = split(
            mask, options.scale, options.softcap, options.dropout_p, *layouts, max_logits=options.max_logits
        )
        return self._template(self._name, *form), data

    @torch.compiler.assume_constant_result
    def _template(self, name: str, *form: Any) -> int:
        """The id of the `Template` for this static part of a call; a constant in the graph. `torch.compile` guards on
        ``name`` (which group) and ``form``.
        """
        assert name == self._name
        return self.calls.template(Form(*form)).number


# What cp=None stands for. One object, so that its plans and compiled graphs are kept from call to call.
ALONE = ContextParallel(Alone())
