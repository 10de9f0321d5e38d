"""The face: `ContextParallel` and `attention`.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Never, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash import collectives, groups, keywords, ops, transforms, validation
from distflash.agreement import Agreement
from distflash.engine import Call, Options, Plan
from distflash.intervals import Sharding
from distflash.kernels import Hopper, Kernel, Problem, Reference, Triton
from distflash.kernels.base import Scores
from distflash.layouts import Layout, Zigzag
from distflash.masks import Full, Key, Mask, from_key
from distflash.schedules import Ring, Schedule
from distflash.transport import Alone, Transport

# Masks and lengths in use at a time: one or two in training, some more in evaluation. Bounds what device memory their
# intervals hold.
_PLANS = 16


# In place of Python's own error for a missing argument comes one that says which of the two to pass.
_REQUIRED: Any = None


class ContextParallel:
    """A group of ranks that hold one sequence together.

    Args:
        group: a ``torch.distributed.ProcessGroup`` that this rank belongs to, a one-dimensional ``DeviceMesh``, or a
            transport (one rank of a `distflash.transport.Simulator`).
        layout: which tokens each rank holds.
        schedule: in which order the other ranks' keys arrive.
        kernel: None for the best kernel that supports the call; a kernel given is used, or refused with all reasons.

    Raises:
        ValueError: an argument is of another kind (a string, a class, a mesh of two dimensions).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | Transport,
        layout: Layout = Zigzag(),
        schedule: Schedule = Ring(),
        kernel: Kernel | None = None,
    ) -> None:
        validation.require_layout(layout)
        validation.require_schedule(schedule)
        validation.require_kernel(kernel)
        self.layout = layout
        self.schedule = schedule
        self.kernel = kernel
        self.transport = groups.transport_of(group)
        self.agreement = Agreement(self.transport)
        # A string, since torch.compile guards the value of strings and may turn ints into symbols.
        self._name = f"context_parallel_{ops.new_number()}"
        self._plan = lru_cache(_PLANS)(self._build_plan)
        self._recipe = lru_cache(_PLANS)(self._build_recipe)
        self._compiled: list[Recipe] = []

    @property
    def rank(self) -> int:
        """This rank's place among those that share the sequence."""
        return self.transport.rank

    @property
    def world_size(self) -> int:
        """How many ranks share the sequence."""
        return self.transport.world_size

    def __repr__(self) -> str:
        return (
            f"ContextParallel(rank {self.rank} of {self.world_size}, layout={self.layout!r}, "
            f"schedule={self.schedule!r}, kernel={self.kernel!r})"
        )

    def seq_local(self, seq_len: int) -> int:
        """How many of ``seq_len`` tokens this rank holds."""
        return self.layout.length(validation.require_seq_len(seq_len), self.world_size, self.rank)

    def positions(self, seq_len: int, device: torch.device | str | None = None) -> Tensor:
        """The ascending global positions of this rank's tokens, int64 ``[seq_local]``: for RoPE and the like.

        Args:
            seq_len: the global length, at least 0.
            device: by default the group's: the current GPU under NCCL, else the CPU.
        """
        seq_len = validation.require_seq_len(seq_len)
        positions = self.layout.positions(seq_len, self.world_size, self.rank)
        return positions.to(self.transport.device if device is None else device)

    def positions_of(self, x: Tensor, seq_len: int) -> Tensor:
        """`positions` of the tokens in ``x [batch, seq_local, ...]``: under `torch.compile` a graph for all lengths.

        Raises:
            ValueError: x does not hold as many tokens as this rank has of ``seq_len``.
        """
        problem = validation.tokens_problem(x) or validation.seq_len_problem(seq_len)
        if problem is not None:
            self._refuse(problem)
        if not torch.compiler.is_compiling():
            return self._recipe(Full(), None, 0.0, 0.0).positions(x, seq_len)
        return ops.positions(x, seq_len, self._compiled_recipe(self._name, Full().key, None, 0.0, 0.0))

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
        return collectives.unshard(x, dim, self.layout, self.transport)

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

    def plan(self, mask: Mask, seq_len: int, device: torch.device | str | None = None) -> Plan:
        """What this rank does in a call: steps, hops, exact pair counts, intervals. Cached; asks no other rank."""
        problem = validation.mask_problem(mask) or validation.seq_len_problem(seq_len)
        problem = problem or validation.documents_problem(mask, seq_len)
        if problem is not None:
            raise ValueError(problem)
        return self._plan(
            mask, validation.as_length(seq_len), torch.device(self.transport.device if device is None else device)
        )

    def _build_plan(self, mask: Mask, seq_len: int, device: torch.device) -> Plan:
        sharding = Sharding(mask, self.layout, seq_len, self.world_size)
        return Plan.build(sharding, self.schedule, self.rank, device)

    def _build_recipe(self, mask: Mask, scale: float | None, softcap: float, dropout_p: float) -> Recipe:
        recipe = Recipe(self, mask, scale, softcap, dropout_p)
        recipe.number = ops.register(recipe)
        return recipe

    @torch.compiler.assume_constant_result
    def _compiled_recipe(self, name: str, mask: Key, scale: float | None, softcap: float, dropout_p: float) -> int:
        """The number of a recipe, a constant to `torch.compile`, which guards ``name`` and the mask's key.

        A compiled graph holds the number alone, so the recipe is kept for as long as this object.
        """
        assert name == self._name
        recipe = self._recipe(from_key(mask), scale, softcap, dropout_p)
        self._compiled.append(recipe)
        return recipe.number

    def _refuse(self, problem: str) -> NoReturn:
        self.agreement.refuse(len(_FIELDS))
        raise ValueError(problem)


_FIELDS = (
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "value head_dim",
    "dtype",
    "seq_len",
    "mask",
    "layout",
    "schedule",
    "scale",
    "softcap",
    "sinks",
    "alibi_slopes",
)


@dataclass(eq=False)
class Recipe:
    """What makes an `engine.Call` once the tensors are known. See `distflash.ops`."""

    cp: ContextParallel
    mask: Mask
    scale: float | None
    softcap: float
    dropout_p: float
    number: int = field(default=0, init=False)

    def call(self, q: Tensor, k: Tensor, v: Tensor, options: Options, *, agree: bool) -> Call:
        problem = Problem(
            device=q.device,
            dtype=q.dtype,
            heads=q.shape[2],
            kv_heads=k.shape[2],
            d_qk=q.shape[3],
            d_v=v.shape[3],
            softcap=self.softcap,
            alibi=options.alibi_slopes is not None,
            sinks=options.sinks is not None,
            dropout_p=self.dropout_p,
        )
        self._require_fit("q", q, options.seq_len)
        kernel = validation.kernel_for(problem, self.cp.kernel, (Hopper(), Triton(), Reference()))
        if isinstance(kernel, str):
            self.cp._refuse(kernel)
        if agree:
            self.cp.agreement.require(self._signature(q.shape[0], problem, options.seq_len))
        return Call(
            plan=self.cp._plan(self.mask, options.seq_len, q.device),
            schedule=self.cp.schedule,
            transport=self.cp.transport,
            kernel=kernel,
            scores=self._scores(problem, options),
        )

    def positions(self, x: Tensor, seq_len: int) -> Tensor:
        self._require_fit("x", x, seq_len)
        return self.cp.positions(seq_len, x.device)

    def _require_fit(self, name: str, x: Tensor, seq_len: int) -> None:
        """Here, and not in `attention`: under `torch.compile` lengths are symbols there, which layouts would pin."""
        cp = self.cp
        problem = validation.length_problem(name, x.shape, self.mask, seq_len, cp.layout, cp.world_size, cp.rank)
        if problem is not None:
            cp._refuse(problem)

    def _scores(self, problem: Problem, options: Options) -> Scores:
        scale = problem.d_qk**-0.5 if self.scale is None else self.scale
        # Kernels read one number after the other, whatever the strides.
        slopes = None if options.alibi_slopes is None else options.alibi_slopes.float().contiguous()
        sinks = None if options.sinks is None else options.sinks.contiguous()
        return Scores(scale, self.softcap, slopes, sinks)

    def _signature(self, batch: int, problem: Problem, seq_len: int) -> tuple[tuple[str, object], ...]:
        values = (
            batch,
            problem.heads,
            problem.kv_heads,
            problem.d_qk,
            problem.d_v,
            problem.dtype,
            seq_len,
            self.mask,
            self.cp.layout,
            self.cp.schedule,
            self.scale,
            self.softcap,
            problem.sinks,
            problem.alibi,
        )
        return tuple(zip(_FIELDS, values, strict=True))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = Full(),
    cp: ContextParallel | None = None,
    seq_len: int | None = None,
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
        mask: which keys a query sees. Combine with ``&``.
        cp: the group that holds the sequence; None: this device holds all of it.
        seq_len: the global length. May be left out where all ranks hold equally many tokens or the mask knows it.
        scale: multiplies ``q k^T``; ``d_qk ** -0.5`` by default. A real number, which may be a tensor ``[]``; no
            gradient: multiply q by what is learned, and by numbers that differ between heads.
        softcap: scores become ``softcap * tanh(score / softcap)``; None or 0 for none. A real number, no gradient.
        alibi_slopes: ``[heads]``; ``slope * |i - j|`` of global positions is subtracted from the scores
            (https://arxiv.org/abs/2108.12409). No gradient.
        sinks: ``[heads]``, one more logit per head in the softmax's denominator, which has no value. Differentiable:
            each rank's gradient is its own queries' part.
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
    problem = (
        keywords.problem(unknown)
        or transforms.problem(q=q, k=k, v=v, sinks=sinks, scale=scale, softcap=softcap)
        or validation.call_problem(q, k, v, mask, sinks, alibi_slopes, scale, softcap, dropout_p)
        or validation.device_problem(q, cp.transport)
    )
    if problem is None:
        seq_len = validation.seq_len_of(q, mask, cp.world_size) if seq_len is None else seq_len
        problem = validation.seq_len_problem(seq_len)
    if problem is not None:
        cp._refuse(problem)
    seq_len, scale = validation.as_length(seq_len), validation.as_number(scale)
    softcap, dropout_p = (validation.as_number(x) or 0.0 for x in (softcap, dropout_p))
    if torch.compiler.is_compiling():
        number = cp._compiled_recipe(cp._name, mask.key, scale, softcap, dropout_p)
        out, lse = ops.attention(q, k, v, sinks, alibi_slopes, seq_len, number)
    else:
        recipe = cp._recipe(mask, scale, softcap, dropout_p)
        out, lse = ops.attention(q, k, v, sinks, alibi_slopes, seq_len, recipe.number)
    return (out, lse) if return_lse else out


# What cp=None stands for. One object, so that its plans and compiled graphs are kept from call to call.
_ALONE = ContextParallel(Alone())
