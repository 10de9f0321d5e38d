"""From arguments to an `engine.Call`: which kernel, do the ranks agree, which plan.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

import torch
from torch import Tensor

from distflash import ops, validation
from distflash.agreement import Agreement, Fields
from distflash.compiled import Data, Form, join
from distflash.engine import Call, Options, Plan
from distflash.exact import Exact, Same
from distflash.intervals import Sharding
from distflash.kernels import Hopper, Kernel, Problem, Reference, Triton
from distflash.kernels.base import Scores
from distflash.layouts import Layout
from distflash.masks import Mask
from distflash.messages import BACKWARD, FORWARD
from distflash.schedules import Schedule
from distflash.transport import Transport

# Masks and lengths in use at a time: one or two in training, some more in evaluation. Bounds what device memory their
# intervals hold.
_PLANS = 16


class Calls:
    """Makes the attention calls of one group of ranks.

    Args:
        transport, layout, schedule, kernel: see `ContextParallel`.
        agreement: what the ranks have agreed on.
    """

    def __init__(
        self, transport: Transport, layout: Layout, schedule: Schedule, kernel: Kernel | None, agreement: Agreement
    ) -> None:
        self.transport, self.layout, self.schedule, self.kernel = transport, layout, schedule, kernel
        self.agreement = agreement
        self._plans = lru_cache(_PLANS)(self._build_plan)
        self._recipes = lru_cache(_PLANS)(self._build_recipe)
        self._recipes_of_same = lru_cache(_PLANS)(self._find_recipe)
        self.kernel_for = lru_cache(_PLANS)(self._kernel_for)
        # Graphs hold the numbers of templates alone, so templates are kept for as long as this object.
        self.template = lru_cache(None)(self._build_template)

    def _kernel_for(self, problem: Problem) -> Kernel | str:
        return validation.kernel_for(problem, self.kernel, (Hopper(), Triton(), Reference()))

    def plan(self, mask: Exact, seq_len: int, device: torch.device) -> Plan:
        """What this rank does under ``mask``."""
        return self._plans(mask, seq_len, device)

    def recipe(self, mask: Mask, scale: float | None, softcap: float, dropout_p: float) -> Recipe:
        """The recipe of a call. All layers of a step pass one mask object, so its fields are looked at once."""
        return self._recipes_of_same(Same(mask), scale, softcap, dropout_p)

    def recipe_of_new(self, mask: Mask, scale: float | None, softcap: float, dropout_p: float) -> Recipe:
        """`recipe` for a mask object that was made for this call alone."""
        return self._recipes(Exact(mask), scale, softcap, dropout_p)

    def _find_recipe(self, mask: Same, scale: float | None, softcap: float, dropout_p: float) -> Recipe:
        return self.recipe_of_new(mask.value, scale, softcap, dropout_p)

    def _build_plan(self, mask: Exact, seq_len: int, device: torch.device) -> Plan:
        sharding = Sharding(mask.value, self.layout, seq_len, self.transport.world_size)
        return Plan.build(sharding, self.schedule, self.transport.rank, device)

    def _build_recipe(self, mask: Exact, scale: float | None, softcap: float, dropout_p: float) -> Recipe:
        recipe = Recipe(self, mask, scale, softcap, dropout_p)
        recipe.number = ops.register(recipe)
        return recipe

    def _build_template(self, form: Form) -> Template:
        template = Template(self, form)
        template.number = ops.register(template)
        return template

    def refuse(self, problem: str) -> NoReturn:
        """Raise ``problem`` on this rank, and make the others raise who are in the same attention call."""
        self.agreement.refuse(FORWARD, sure=False)
        raise ValueError(problem)


@dataclass(eq=False)
class _Fillable:
    """See `ops.Fillable`. number: by which ops find it."""

    calls: Calls
    number: int = field(default=0, init=False, kw_only=True)

    @property
    def numbered(self) -> bool:
        return self.calls.agreement.every_call and self.calls.transport.world_size > 1


@dataclass(eq=False)
class Recipe(_Fillable):
    """A call but for its tensors. See `ops.Recipe`."""

    exact_mask: Exact
    scale: float | None
    softcap: float
    dropout_p: float

    @property
    def mask(self) -> Mask:
        mask: Mask = self.exact_mask.value
        return mask

    def filled(self, data: Data) -> Recipe:
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options, needs_grad: bool) -> tuple[Call, int]:
        """The call, which the ranks have agreed on, and its number.

        Raises:
            ValueError: on every rank, if any rank's arguments are wrong or ranks disagree.
        """
        problem, seq_len = self.problem(q, k, v, options), self._seq_len("q", q, options.seq_len)
        kernel = self.kernel(problem)

        def fields() -> Fields:
            return self._fields(q.shape[0], problem, seq_len, needs_grad, kernel, options)

        number = self.calls.agreement.require_next(fields, self._key(q.shape[0], problem, seq_len, needs_grad))
        return self._call(problem, seq_len, kernel, options), number

    def backward(self, q: Tensor, k: Tensor, v: Tensor, options: Options, number: Tensor) -> Call:
        """The call of the forward that returned ``number``.

        Raises:
            ValueError: on every rank, if a rank makes another call at this point.
        """
        if self.numbered:
            self.calls.agreement.require(BACKWARD, dict, number=int(number))
        problem, seq_len = self.problem(q, k, v, options), self._seq_len("q", q, options.seq_len)
        return self._call(problem, seq_len, self.kernel(problem), options)

    def positions(self, x: Tensor, seq_len: int | None) -> Tensor:
        transport, seq_len = self.calls.transport, self._seq_len("x", x, seq_len)
        return self.calls.layout.positions(seq_len, transport.world_size, transport.rank).to(x.device)

    def kernel(self, problem: Problem) -> Kernel:
        """The kernel that a call takes."""
        kernel = self.calls.kernel_for(problem)
        return self.calls.refuse(kernel) if isinstance(kernel, str) else kernel

    def _seq_len(self, name: str, x: Tensor, seq_len: int | None) -> int:
        """The global length. Found and checked here, since under `torch.compile` lengths are symbols before the op."""
        layout, transport = self.calls.layout, self.calls.transport
        W, rank = transport.world_size, transport.rank
        seq_len = validation.seq_len_of(x, self.mask, W) if seq_len is None else seq_len
        problem = validation.length_problem(name, x.shape, self.mask, seq_len, layout, W, rank)
        return self.calls.refuse(problem) if problem is not None else seq_len

    def problem(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Problem:
        """What the call asks of a kernel."""
        return Problem(
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

    def _call(self, problem: Problem, seq_len: int, kernel: Kernel, options: Options) -> Call:
        scale = problem.d_qk**-0.5 if self.scale is None else self.scale
        # Kernels read one number after the other, whatever the strides.
        slopes = None if options.alibi_slopes is None else options.alibi_slopes.float().contiguous()
        sinks = None if options.sinks is None else options.sinks.contiguous()
        return Call(
            plan=self.calls.plan(self.exact_mask, seq_len, problem.device),
            schedule=self.calls.schedule,
            transport=self.calls.transport,
            kernel=kernel,
            scores=Scores(scale, self.softcap, slopes, sinks),
        )

    def _key(self, batch: int, problem: Problem, seq_len: int, needs_grad: bool) -> Hashable:
        """The call's signature: everything in `_fields` but for values in tensors and what follows from the rest."""
        return self.exact_mask, self.scale, problem, batch, seq_len, needs_grad

    def _fields(
        self, batch: int, problem: Problem, seq_len: int, needs_grad: bool, kernel: Kernel, options: Options
    ) -> Fields:
        """What all ranks must have alike."""
        return {
            "batch": batch,
            "heads": problem.heads,
            "kv_heads": problem.kv_heads,
            "head_dim": problem.d_qk,
            "value head_dim": problem.d_v,
            "dtype": problem.dtype,
            "device": problem.device.type,
            "seq_len": seq_len,
            "mask": self.mask,
            "layout": self.calls.layout,
            "schedule": self.calls.schedule,
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": problem.sinks,
            "alibi_slopes": problem.alibi,
            "needs a gradient": needs_grad,
            "check_every_call": self.calls.agreement.every_call,
            "kernel": kernel,
            "the values of sinks": _values(options.sinks),
            "the values of alibi_slopes": _values(options.alibi_slopes),
        }


@dataclass(eq=False)
class Template(_Fillable):
    """A call of a compiled graph: a recipe once its data are known."""

    form: Form

    def filled(self, data: Data) -> Recipe:
        try:
            mask, scale, softcap, dropout_p = join(self.form, data)
        except ValueError as error:
            problem: str | None = str(error)
        else:
            problem = validation.numbers_problem(scale, softcap, dropout_p)
        if problem is not None:
            self.calls.refuse(problem)
        return self.calls.recipe_of_new(mask, scale, softcap, dropout_p)


def _values(x: Tensor | None) -> str:
    return "" if x is None else f"{x.dtype} {x.tolist()}"
