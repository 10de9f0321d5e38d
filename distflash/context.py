"""A group of ranks that hold one sequence together: `ContextParallel`.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash import collectives, groups, lengths, ops, redistribution, validation
from distflash.agreement import Agreement
from distflash.call import Calls, Numbers, new_number
from distflash.compiled import NO_DATA, Data, Form, split
from distflash.exact import Exact
from distflash.kernels import Kernel
from distflash.layouts import Layout, Zigzag
from distflash.masks import Documents, Full, Mask
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
        self.calls = Calls(self.transport, layout, self.schedule, kernel, self.agreement)
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
            self.calls.refuse(problem)
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
        recipe, data = self.recipe(mask, Numbers())
        return ops.positions(x, as_given(seq_len, 0, None), recipe, *data)

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

    def gather(self, x: Tensor, dim: int = 1, seq_len: int | None = None) -> Tensor:
        """Every rank's tokens, whole, on every rank, as `unshard`. All ranks must call.

        For a layer that mixes tokens by something else than attention: it runs on the whole sequence, and `shard` keeps
        this rank's part of what it returns. The sum over ranks of the layer's gradients is then that of one process.
        Its backward reduces and scatters: a rank receives the gradients of its own tokens only.

        Args:
            x: this rank's tokens along ``dim``.
            seq_len: the global length. Where it is given, no rank asks the others how many tokens they hold, which on
                GPUs the host would have to wait for.

        Raises:
            ValueError: on every rank, if an argument is wrong on any, or they differ. With ``seq_len``, on GPUs only
                before the first call with these sizes.
        """
        if seq_len is None:
            return self.unshard(x, dim)
        return collectives.gather(x, dim, seq_len, self.layout, self.agreement)

    def halo(self, x: Tensor, left: int, dim: int = 1, documents: Documents | None = None) -> tuple[Tensor, Tensor]:
        """This rank's tokens with the ``left`` rows that precede them in the sequence. All ranks must call.

            rows, places = cp.halo(x, left=3)
            y = causal_conv1d_of_4_taps(rows)[:, places]

        In front of each run of this rank's consecutive tokens come the rows of the tokens before it, and zeros where
        the sequence, or the document, has none. Only these rows travel, each once to a rank. `Contiguous` has one run,
        `Zigzag` two; in `Striped` every token is a run of its own, so that there are ``left + 1`` times as many rows.

        Args:
            x: this rank's tokens along ``dim``.
            left: how many rows, at least 0: k - 1 for a causal convolution of k taps.
            documents: where packed documents end. A document's first tokens have zeros before them.

        Returns:
            The rows, as ``x`` but for their number along ``dim``, and the places int64 ``[seq_local]`` of this rank's
            tokens among them. Differentiable: gradients of rows that travelled are sent back and added up.

        Raises:
            ValueError: on every rank, if an argument is wrong on any, or they differ.
        """
        return redistribution.halo(x, left, dim, documents, self.layout, self.agreement)

    def relayout(self, x: Tensor, dim: int, layout: Layout, source: Layout | None = None) -> Tensor:
        """This rank's tokens in another layout. Only tokens that change ranks travel. All ranks must call.

        Args:
            x: this rank's tokens along ``dim``, in ``source``.
            layout: which tokens this rank is to have.
            source: which ones it has; None for the layout of this ContextParallel.

        Returns:
            As ``x``, but with ``layout.length(seq_len, world_size, rank)`` tokens. Differentiable.

        Raises:
            ValueError: on every rank, if an argument is wrong on any, or they differ.
        """
        return redistribution.relayout(x, dim, layout, self.layout if source is None else source, self.agreement)

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
        return self.calls.plan(Exact(mask), Tokens(length, start, count, kv_layout), where)

    def recipe(self, mask: Mask, numbers: Numbers) -> tuple[int, Data]:
        """The number by which an op finds the call's recipe, and what the op is given beside it."""
        if not torch.compiler.is_compiling():
            return self.calls.recipe(mask, numbers).number, NO_DATA
        form, data = split(mask, numbers.scale, numbers.softcap, numbers.dropout_p, numbers.kv_layout)
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
