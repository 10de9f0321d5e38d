"""From arguments to an `engine.Call`: which kernel, do the ranks agree, which plan.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distflash import lengths, validation
from distflash.agreement import Agreement, Fields
from distflash.attend import Attention
from distflash.chunks import Chunk
from distflash.compiled import Data, Form, join
from distflash.engine import Call
from distflash.exact import Exact, Same
from distflash.folding import Folding
from distflash.geometry import Geometry, Sharded
from distflash.given import Given, Numbers, Signature
from distflash.horizon import Horizon
from distflash.kernels import Hopper, Kernel, Problem, Reference, Triton
from distflash.kernels.base import Scores
from distflash.kernels.decoding import Decoding
from distflash.layouts import Layout
from distflash.ledger import Ledger
from distflash.masks import Mask
from distflash.messages import BACKWARD, FORWARD
from distflash.overlap import overlap
from distflash.placement import Placement, Sizes, sizes
from distflash.plan import Plan
from distflash.rows import Rows, geometry_of
from distflash.schedules import Schedule
from distflash.schedules.base import Asked, require_whole
from distflash.specification import Specification, Tokens
from distflash.transport import Transport, preparing

# Masks and lengths in use at a time: one or two in training, some more in evaluation. Bounds what device memory their
# intervals hold.
_PLANS = 16
# Chunks of one prompt, which the layers of a model share; their plans must not push those of training out.
_CHUNKS = 8
_numbers = count(1)


def new_number() -> int:
    """A number that no other template or group of this process has."""
    return next(_numbers)


class Calls:
    """Makes the attention calls of one group of ranks.

    Args:
        transport, layout, schedule, kernel: see `ContextParallel`.
        agreement: what the ranks have agreed on.
        before_first: called before the first call of a specification, and its kernel, sends anything.
    """

    def __init__(
        self,
        transport: Transport,
        layout: Layout,
        schedule: Schedule,
        kernel: Kernel | None,
        agreement: Agreement,
        before_first: Callable[[Calls, Specification, Kernel], None] = lambda *_: None,
    ) -> None:
        self.transport, self.layout, self.schedule, self.kernel = transport, layout, schedule, kernel
        self.agreement, self.before_first = agreement, before_first
        self.among = schedule.among(transport)
        # Caches begin with this one ledger, so that those of all layers share what follows from it.
        self.nothing = Ledger.empty(transport.world_size)
        self.chunk_plan = lru_cache(_CHUNKS)(self._chunk_plan)
        self.horizon = lru_cache(_PLANS)(self._horizon)
        self.decoding = lru_cache(_PLANS)(self._decoding)
        self.exact = lru_cache(_PLANS)(self._exact)
        self.plan_on_host = lru_cache(_PLANS)(self._plan_on_host)
        self.plan = lru_cache(_PLANS)(self._plan)
        self.prepare = lru_cache(_PLANS)(self._prepare)
        self.prepared_for = lru_cache(_PLANS)(self._prepared_for)
        self.kernel_for = lru_cache(_PLANS)(self._kernel_for)
        self._recipes = lru_cache(_PLANS)(self._recipe_of)
        self._recipes_of_same = lru_cache(_PLANS)(self._recipe_of_same)
        # Graphs hold the numbers of templates alone, so templates are kept for as long as this object.
        self.template = lru_cache(None)(self._template)

    def recipe(self, mask: Mask, numbers: Numbers) -> Recipe:
        """The recipe of a call. All layers of a step pass one mask object, so its fields are looked at once."""
        return self._recipes_of_same(Same(mask), numbers)

    def recipe_of_new(self, mask: Mask, numbers: Numbers) -> Recipe:
        """`recipe` for a mask object that was made for this call alone."""
        return self._recipes(Exact(mask), numbers)

    def refuse(self, problem: str) -> NoReturn:
        """Raise ``problem`` on this rank, and make the others raise who are in the same attention call."""
        self.agreement.refuse(FORWARD, sure=False)
        raise ValueError(problem)

    def positions(self, tokens: Tokens) -> Tensor:
        """int64 ``[T]``: the positions of this rank's queries."""
        layout, ranks = tokens.layout or self.layout, self.transport.world_size
        return Sharded(layout, tokens.q_len, ranks, tokens.q_start).positions(self.transport.rank)

    def _geometry(self, mask: Mask, tokens: Tokens) -> Geometry:
        """The queries and keys of all ranks, with the rows of a batch end to end under `Rows`."""
        W, layout = self.transport.world_size, tokens.layout or self.layout
        queries = Sharded(layout, tokens.q_len, W, tokens.q_start)
        keys = Sharded(tokens.kv_layout or layout, tokens.seq_len, W)
        return geometry_of(mask, queries, queries if keys == queries else keys, tokens.seq_len)

    def _plan_on_host(self, mask: Exact, tokens: Tokens) -> Plan:
        """What this rank does under ``mask``, as the schedule has it."""
        plan = self.schedule.plan(self._geometry(mask.value, tokens), self.transport.rank)
        require_whole(plan, self.schedule)
        return plan

    def _plan(self, mask: Exact, tokens: Tokens, device: torch.device) -> Plan:
        return self.plan_on_host(mask, tokens).to(device)

    def _horizon(self, mask: Exact, start: int, count: int, device: torch.device) -> Horizon:
        """What queries at ``count`` positions from ``start`` on see."""
        return Horizon.of(mask.value, start, count, device)

    def _decoding(self, kernel: Kernel, device: torch.device) -> Decoding:
        """One object for all steps: it may own memory that they share."""
        return kernel.decoding(device)

    def _exact(self, mask: Same) -> Exact:
        return Exact(mask.value)

    def _chunk_plan(self, chunk: Chunk, kernel: Kernel) -> Plan:
        """What this rank does for a chunk's queries, or ValueError where keys that they see are not there."""
        if (problem := chunk.refusal()) is not None:
            raise ValueError(problem)
        return chunk.plan(self.schedule, kernel, self.transport.rank, self.transport.near)

    def _prepared_for(self, recipe: Recipe, signature: Signature) -> Prepared:
        return self.prepare(recipe.specify(signature))

    def _prepare(self, specification: Specification) -> Prepared:
        problem, mask = specification.problem, specification.mask.value
        kernel = self.kernel_for(problem)
        if isinstance(kernel, str):
            self.refuse(kernel)
        geometry = self._geometry(mask, specification.tokens)
        asked = Asked(geometry.queries, geometry.keys, problem.heads, problem.kv_heads, problem.device)
        try:
            of_schedule = self.schedule.placement(self.transport, asked)
        except ValueError as error:
            self.refuse(str(error))
        of_rows = Folding(specification.batch) if isinstance(mask, Rows) and specification.batch else None
        of_schedule = of_schedule if specification.batch else None  # nothing moves in a batch of none
        placements = tuple(placement for placement in (of_rows, of_schedule) if placement is not None)
        self.before_first(self, specification, kernel)
        return Prepared(self, specification, kernel, placements)

    def _kernel_for(self, problem: Problem) -> Kernel | str:
        return validation.kernel_for(problem, self.kernel, (Hopper(), Triton(), Reference()))

    def _recipe_of_same(self, mask: Same, numbers: Numbers) -> Recipe:
        return self.recipe_of_new(mask.value, numbers)

    def _recipe_of(self, mask: Exact, numbers: Numbers) -> Recipe:
        return Recipe(self, mask, numbers)

    def _template(self, form: Form) -> Template:
        return Template(self, form)


@dataclass(eq=False)
class Prepared:
    """What follows from a specification: found once, and kept for the calls of all layers and steps that have it.

    Attributes:
        kernel: that the call takes.
        placements: from what users hold to what kernels see.
    """

    calls: Calls
    specification: Specification
    kernel: Kernel
    placements: tuple[Placement, ...]

    @cached_property
    def sizes(self) -> Sizes:
        """Of what kernels see."""
        problem = self.specification.problem
        return sizes(self.placements, Sizes(self.specification.batch, slice(0, problem.heads), problem.kv_heads))

    @cached_property
    def plan(self) -> Plan:
        """For the kernel. Made when the ranks have agreed: ranks that do not would make plans that do not fit."""
        calls, device = self.calls, self.specification.problem.device
        plan = calls.plan_on_host(self.specification.mask, self.specification.tokens)
        abilities = self.kernel.abilities(device)
        return overlap(plan, self.sizes.kv_heads, self.sizes.batch, abilities, calls.transport.near).to(device)

    @cached_property
    def plain(self) -> Attention:
        """The call without sinks and slopes, which is the same each time."""
        return self.attention(Given(()))

    def attention(self, given: Given) -> Attention:
        """The call."""
        specification, heads = self.specification, self.sizes.heads
        problem = specification.problem
        scores = scores_of(problem.d_qk, specification.scale, problem.softcap, given.alibi_slopes, given.sinks)
        call = Call(
            plan=self.plan,
            transport=self.calls.among,
            kernel=self.kernel,
            scores=scores.of_heads(heads) if self.placements else scores,
            rounds_keys=not any(placement.adds_keys for placement in self.placements),
        )
        return Attention(call, self.placements, problem.heads, heads)


@dataclass(eq=False)
class _Numbered:
    """What an op finds by its number for as long as it lives."""

    calls: Calls
    number: int = field(default_factory=new_number, init=False, kw_only=True)

    def __post_init__(self) -> None:
        templates[self.number] = self

    @property
    def numbered(self) -> bool:
        """Whether the forward's number has to reach the backward."""
        return self.calls.agreement.every_call and self.calls.transport.world_size > 1

    def filled(self, data: Data) -> Recipe:
        """The recipe, once it has its data: those of `compiled.Data`, none outside compiled graphs."""
        raise TypeError(f"{type(self).__name__} makes no recipe")


templates: WeakValueDictionary[int, _Numbered] = WeakValueDictionary()


@dataclass(eq=False)
class Recipe(_Numbered):
    """A call but for its tensors."""

    mask: Exact
    numbers: Numbers

    def filled(self, data: Data) -> Recipe:
        return self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, given: Given, needs_grad: bool) -> tuple[Attention, int]:
        """The call, which the ranks have agreed on, and its number.

        Raises:
            ValueError: on every rank, if any rank's arguments are wrong or ranks disagree.
        """
        prepared = self._prepared(q, k, v, given, needs_grad)
        number = self.calls.agreement.require_next(lambda: self._fields(prepared, given), prepared.specification)
        with preparing(self.calls.transport):
            return self._call(prepared, given), number

    def backward(self, q: Tensor, k: Tensor, v: Tensor, given: Given, number: Tensor | None) -> Attention:
        """The call of the forward that returned ``number``.

        Raises:
            ValueError: on every rank, if a rank makes another call at this point.
        """
        if self.numbered:
            assert number is not None
            self.calls.agreement.require(BACKWARD, dict, number=int(number))
        prepared = self._prepared(q, k, v, given, True)
        with preparing(self.calls.transport):
            return self._call(prepared, given)

    def positions(self, x: Tensor, given: Sequence[int]) -> Tensor:
        """int64 ``[T]``: the positions of this rank's tokens, from the lengths of a `Given`."""
        return self.calls.positions(self._tokens("x", x.shape, x.shape, given)).to(x.device)

    def _prepared(self, q: Tensor, k: Tensor, v: Tensor, given: Given, needs_grad: bool) -> Prepared:
        sinks, alibi = given.sinks is not None, given.alibi_slopes is not None
        shapes = q.shape, k.shape, v.shape
        signature = Signature(*shapes, q.dtype, q.device, tuple(given.lengths), sinks, alibi, needs_grad)
        return self.calls.prepared_for(self, signature)

    def specify(self, asked: Signature) -> Specification:
        """What the ranks compare, once this rank's lengths are found and checked."""
        problem = Problem(
            device=asked.device,
            dtype=asked.dtype,
            heads=asked.q[2],
            kv_heads=asked.k[2],
            d_qk=asked.q[3],
            d_v=asked.v[3],
            softcap=self.numbers.softcap,
            alibi=asked.alibi,
            sinks=asked.sinks,
            dropout_p=self.numbers.dropout_p,
        )
        tokens = self._tokens("q", asked.q, asked.k, asked.lengths)
        return Specification(problem, asked.q[0], tokens, self.mask, self.numbers.scale, asked.needs_grad)

    def _tokens(self, name: str, q: torch.Size, k: torch.Size, given: Sequence[int]) -> Tokens:
        """Of queries and keys of these shapes. Checked here: under `torch.compile` lengths are symbols before."""
        mask, calls, kv_layout = self.mask.value, self.calls, self.numbers.kv_layout
        layout = self.numbers.layout or calls.layout
        W, rank = calls.transport.world_size, calls.transport.rank
        seq_len, q_start, q_len = given
        own_keys = q_start == 0 and q_len == -1 and kv_layout is None
        seq_len = lengths.seq_len_of(k, mask, W) if seq_len == -1 else seq_len
        if q_len == -1:
            q_len = q[1] * W if q_start else seq_len
        tokens = Tokens(seq_len, q_start, q_len, kv_layout, self.numbers.layout)
        problem = (
            lengths.length_problem(name, q, mask, seq_len, layout, W, rank)
            if own_keys
            else lengths.length_problem("k", k, mask, seq_len, kv_layout or layout, W, rank)
            or lengths.chunk_problem(q, q_start, q_len, seq_len, mask, layout, W, rank)
        )
        problem = problem or lengths.rows_problem(mask, q[0], seq_len)
        return calls.refuse(problem) if problem is not None else tokens

    def _call(self, prepared: Prepared, given: Given) -> Attention:
        if given.sinks is None and given.alibi_slopes is None:
            return prepared.plain
        return prepared.attention(given)

    def _fields(self, prepared: Prepared, given: Given) -> Fields:
        """What all ranks must have alike."""
        layout = self.numbers.layout or self.calls.layout
        tokens = prepared.specification.tokens.q_len
        held = layout.fingerprint(tokens, self.calls.transport.world_size)
        return prepared.specification.fields() | {
            "layout": (layout, held) if held else layout,
            "schedule": self.calls.schedule,
            "check_every_call": self.calls.agreement.every_call,
            "kernel": prepared.kernel,
            "the values of sinks": _values(given.sinks),
            "the values of alibi_slopes": _values(given.alibi_slopes),
        }


@dataclass(eq=False)
class Template(_Numbered):
    """A call of a compiled graph: a recipe once its data are known."""

    form: Form

    def filled(self, data: Data) -> Recipe:
        try:
            mask, scale, softcap, dropout_p, *layouts = join(self.form, data)
        except ValueError as error:
            problem: str | None = str(error)
        else:
            problem = validation.numbers_problem(scale, softcap, dropout_p)
        if problem is not None:
            self.calls.refuse(problem)
        return self.calls.recipe_of_new(mask, Numbers(scale, softcap, dropout_p, *layouts))


def scores_of(
    d_qk: int, scale: float | None, softcap: float, alibi_slopes: Tensor | None, sinks: Tensor | None
) -> Scores:
    """How a call forms its scores, as kernels take it: they read one number after the other, whatever the strides."""
    slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    return Scores(d_qk**-0.5 if scale is None else scale, softcap, slopes, sinks)


def _values(x: Tensor | None) -> str:
    return "" if x is None else f"{x.dtype} {x.tolist()}"
