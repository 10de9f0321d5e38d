"""From arguments to an `engine.Call`: the choice of the kernel, the agreement of the ranks, and the plan.

The path of a call: `Recipe` (mask, options, group) and `Signature` (shapes, dtype, lengths) give a `Specification`,
which is the key of a cache; `Prepared` is what the cache holds (kernel, plan, redistributions). After the agreement of
the ranks it gives a `PlacedCall`, which has the tensors of this call (sinks, ALiBi slopes) and the `engine.Call`. A
`Template` is a `Recipe` whose mask and options may be inputs of a compiled graph. Ops find both by an integer id, in
`templates`.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import count
from typing import NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distflash import lengths, validation
from distflash.agreement import Agreement, Fields
from distflash.attend import PlacedCall
from distflash.chunks import Chunk
from distflash.compiled import Data, Form, join
from distflash.dropout import dropout_of, in_steps
from distflash.engine import Call
from distflash.exact import ByIdentity, ByValue
from distflash.folding import Folding
from distflash.geometry import Geometry, Sharded
from distflash.given import PLAIN, Given, Options, Signature
from distflash.horizon import Horizon
from distflash.kernels import Hopper, Kernel, Problem, Reference, Triton
from distflash.kernels.base import Scores
from distflash.kernels.decoding import Decoding
from distflash.layouts import Layout
from distflash.ledger import Ledger
from distflash.mask_algebra import Mask
from distflash.messages import BACKWARD, FORWARD
from distflash.overlap import overlap
from distflash.placement import Placement, Sizes, sizes
from distflash.plan import Plan
from distflash.rows import Rows, geometry_of
from distflash.schedules import Schedule
from distflash.schedules.base import Asked, require_whole
from distflash.specification import CallTokens, Specification
from distflash.transport import Transport, preparing

# Plans kept: training uses one or two masks and lengths at a time, evaluation some more. With the
# calls that `repeats` keeps, this bounds the device memory of their intervals.
_PLANS = 16
# Plans of chunks kept: those of one prompt, which the layers of a model share. Apart from the plans of training, which
# they must not evict.
_CHUNKS = 8
_numbers = count(1)


def new_number() -> int:
    """A number that is unique in this process."""
    return next(_numbers)


class Calls:
    """Makes the attention calls of one group of ranks.

    Args:
        transport, layout, schedule, kernel: see `ContextParallel`.
        agreement: compares calls over the ranks.
    """

    def __init__(
        self,
        transport: Transport,
        layout: Layout,
        schedule: Schedule,
        kernel: Kernel | None,
        agreement: Agreement,
    ) -> None:
        self.transport, self.layout, self.schedule, self.kernel = transport, layout, schedule, kernel
        self.agreement = agreement
        self.among = schedule.among(transport)
        # The empty KV-cache block table (`Ledger`): one object, so that all layers share the tables derived from it.
        self.nothing = Ledger.empty(transport.world_size)
        self.chunk_plan = lru_cache(_CHUNKS)(self._chunk_plan)
        self.horizon = lru_cache(_PLANS)(self._horizon)
        self.decoding = lru_cache(_PLANS)(self._decoding)
        self.by_value = lru_cache(_PLANS)(self._by_value)
        self.plan_on_host = lru_cache(_PLANS)(self._plan_on_host)
        self.plan = lru_cache(_PLANS)(self._plan)
        self.prepare = lru_cache(_PLANS)(self._prepare)
        self.prepared_for = lru_cache(_PLANS)(self._prepared_for)
        self.kernel_for = lru_cache(_PLANS)(self._kernel_for)
        self._recipes = lru_cache(_PLANS)(self._recipe_of)
        self._recipes_by_identity = lru_cache(_PLANS)(self._recipe_by_identity)
        # Compiled graphs refer to templates by number, so templates live as long as this object.
        self.template = lru_cache(None)(self._template)

    def recipe(self, mask: Mask, options: Options) -> Recipe:
        """The recipe of a call. Cached by the mask object, which all layers of a step share."""
        return self._recipes_by_identity(ByIdentity(mask), options)

    def recipe_of_new(self, mask: Mask, options: Options) -> Recipe:
        """`recipe` for a mask object that is used only once; cached by the mask's value."""
        return self._recipes(ByValue(mask), options)

    @property
    def numbered(self) -> bool:
        """Whether backward checks that all ranks run the backward of the same forward call."""
        return self.agreement.every_call and self.transport.world_size > 1

    def refuse(self, problem: str) -> NoReturn:
        """Raise ``problem`` on this rank, and make ranks that compare the same attention call raise as well."""
        self.agreement.refuse(FORWARD, others_compare=False)
        raise ValueError(problem)

    def positions(self, tokens: CallTokens) -> Tensor:
        """int64 ``[T]``: the positions of this rank's queries."""
        layout, ranks = tokens.layout or self.layout, self.transport.world_size
        return Sharded(layout, tokens.q_len, ranks, tokens.q_start).positions(self.transport.rank)

    def _geometry(self, mask: Mask, tokens: CallTokens) -> Geometry:
        """The queries and keys of all ranks, under `Rows` (one mask per sequence) with the batch concatenated to one
        sequence.
        """
        W, layout = self.transport.world_size, tokens.layout or self.layout
        queries = Sharded(layout, tokens.q_len, W, tokens.q_start)
        keys = Sharded(tokens.kv_layout or layout, tokens.seq_len, W)
        return geometry_of(mask, queries, queries if keys == queries else keys, tokens.seq_len)

    def _plan_on_host(self, mask: ByValue, tokens: CallTokens) -> Plan:
        """The plan of this rank, as the schedule makes it."""
        plan = self.schedule.plan(self._geometry(mask.value, tokens), self.transport.rank)
        require_whole(plan, self.schedule)
        return plan

    def _plan(self, mask: ByValue, tokens: CallTokens, device: torch.device) -> Plan:
        return self.plan_on_host(mask, tokens).to(device)

    def _horizon(self, mask: ByValue, start: int, count: int, device: torch.device) -> Horizon:
        """The mask bounds of ``count`` positions from ``start`` on."""
        return Horizon.of(mask.value, start, count, device)

    def _decoding(self, kernel: Kernel, device: torch.device) -> Decoding:
        """One object for all steps, since it may own memory that they share."""
        return kernel.decoding(device)

    def _by_value(self, mask: ByIdentity) -> ByValue:
        return ByValue(mask.value)

    def _chunk_plan(self, chunk: Chunk, kernel: Kernel) -> Plan:
        """The plan of a chunk's queries; a ValueError if the cache has dropped keys that they see."""
        if (problem := chunk.refusal()) is not None:
            raise ValueError(problem)
        return chunk.plan(self.schedule, kernel, self.transport.rank, self.transport.intra_node)

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
        of_schedule = of_schedule if specification.batch else None  # a batch of 0 is not redistributed
        placements = tuple(placement for placement in (of_rows, of_schedule) if placement is not None)
        return Prepared(self, specification, kernel, placements)

    def _kernel_for(self, problem: Problem) -> Kernel | str:
        repeats = self.schedule.reproducible
        known = Hopper(deterministic=repeats), Triton(), Reference()
        return validation.kernel_for(problem, self.kernel, known, repeats)

    def _recipe_by_identity(self, mask: ByIdentity, options: Options) -> Recipe:
        return self.recipe_of_new(mask.value, options)

    def _recipe_of(self, mask: ByValue, options: Options) -> Recipe:
        return Recipe(self, mask, replace(options, dropout_p=in_steps(options.dropout_p)))

    def _template(self, form: Form) -> Template:
        return Template(self, form)


@dataclass(eq=False)
class Prepared:
    """Kernel, plan and redistributions for one specification, cached across layers and steps.

    Attributes:
        kernel: the kernel of the call.
        placements: the redistributions before the engine, in order.
    """

    calls: Calls
    specification: Specification
    kernel: Kernel
    placements: tuple[Placement, ...]

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes of the redistributed tensors."""
        problem = self.specification.problem
        return sizes(self.placements, Sizes(self.specification.batch, slice(0, problem.heads), problem.kv_heads))

    @cached_property
    def plan(self) -> Plan:
        """The plan for the kernel. Made after the agreement: plans of ranks that disagree would not match."""
        calls, device = self.calls, self.specification.problem.device
        plan = calls.plan_on_host(self.specification.mask, self.specification.tokens)
        abilities = self.kernel.abilities(device)
        return overlap(plan, self.sizes.kv_heads, self.sizes.batch, abilities, calls.transport.intra_node).to(device)

    @cached_property
    def plain(self) -> PlacedCall:
        """The call without sinks, slopes and dropout: one object for all calls."""
        return self.attention(PLAIN)

    def forward_call(self, given: Given) -> tuple[PlacedCall, int]:
        """The call, after the agreement of the ranks, and its number.

        Raises:
            ValueError: on every rank, if any rank's arguments are wrong or ranks disagree.
        """
        number = self.calls.agreement.require_next(lambda: self._fields(given), self.specification)
        return self._call(given), number

    def backward_call(self, given: Given, number: Tensor | None) -> PlacedCall:
        """The call of the forward that returned ``number``, or None where the ranks do not compare it.

        Raises:
            ValueError: on every rank, if a rank makes another call at the same time.
        """
        if number is not None:
            self.calls.agreement.require(BACKWARD, dict, number=int(number))
        return self._call(given)

    def _call(self, given: Given) -> PlacedCall:
        if (plain := given.is_plain) and "plain" in self.__dict__:  # nothing is left to do that could fail
            return self.plain
        with preparing(self.calls.transport):
            return self.plain if plain else self.attention(given)

    def _fields(self, given: Given) -> Fields:
        """What has to be equal on all ranks, by names for errors."""
        calls, tokens = self.calls, self.specification.tokens
        layout = tokens.layout or calls.layout
        held = layout.digest(tokens.q_len, calls.transport.world_size)
        return self.specification.fields() | {
            "layout": (layout, held) if held else layout,
            "schedule": calls.schedule,
            "check_every_call": calls.agreement.every_call,
            "kernel": self.kernel,
            "the values of sinks": _values(given.sinks),
            "the values of alibi_slopes": _values(given.alibi_slopes),
            "the value of dropout_seed": _values(given.dropout_seed),
        }

    def attention(self, given: Given) -> PlacedCall:
        """The call."""
        specification, heads = self.specification, self.sizes.heads
        problem = specification.problem
        seed = given.dropout_seed
        dropout = None if seed is None else dropout_of(problem.dropout_p, seed)
        scores = Scores.of(problem.d_qk, specification.scale, problem.softcap, given.alibi_slopes, given.sinks, dropout)
        call = Call(
            plan=self.plan,
            transport=self.calls.among,
            kernel=self.kernel,
            scores=scores.of_heads(heads) if self.placements else scores,
            rounds_keys=not any(placement.adds_keys for placement in self.placements),
            max_logits=problem.max_logits,
        )
        return PlacedCall(call, self.placements, problem.heads, heads, self.calls.transport)


@dataclass(eq=False)
class _Numbered:
    """An object that custom ops look up by integer id (a weak reference), since ops take only tensors and numbers."""

    calls: Calls
    number: int = field(default_factory=new_number, init=False, kw_only=True)

    def __post_init__(self) -> None:
        templates[self.number] = self

    @property
    def numbered(self) -> bool:
        """See `Calls.numbered`."""
        return self.calls.numbered

    def filled(self, data: Data) -> Recipe:
        """The recipe with its data, which only calls in compiled graphs have."""
        raise TypeError(f"{type(self).__name__} makes no recipe")


templates: WeakValueDictionary[int, _Numbered] = WeakValueDictionary()


@dataclass(eq=False)
class Recipe(_Numbered):
    """An attention call without its tensors: mask, options and group."""

    mask: ByValue
    options: Options

    def filled(self, data: Data) -> Recipe:
        return self

    def prepared(self, q: Tensor, k: Tensor, v: Tensor, given: Given, needs_grad: bool) -> Prepared:
        """What is prepared for calls with such tensors. needs_grad: whether a backward may follow.

        Raises:
            ValueError: a length is wrong, or no kernel or schedule supports the call.
        """
        sinks, alibi = given.sinks is not None, given.alibi_slopes is not None
        shapes = q.shape, k.shape, v.shape
        signature = Signature(*shapes, q.dtype, q.device, tuple(given.lengths), sinks, alibi, needs_grad)
        return self.calls.prepared_for(self, signature)

    def positions(self, x: Tensor, given: Sequence[int]) -> Tensor:
        """int64 ``[T]``: the positions of this rank's tokens, from the lengths of a `Given`."""
        return self.calls.positions(self._tokens("x", x.shape, x.shape, given)).to(x.device)

    def specify(self, asked: Signature) -> Specification:
        """The specification of a call, once this rank's lengths are known and checked."""
        problem = Problem(
            device=asked.device,
            dtype=asked.dtype,
            heads=asked.q[2],
            kv_heads=asked.k[2],
            d_qk=asked.q[3],
            d_v=asked.v[3],
            softcap=self.options.softcap,
            alibi=asked.alibi,
            sinks=asked.sinks,
            dropout_p=self.options.dropout_p,
            max_logits=self.options.max_logits,
        )
        tokens = self._tokens("q", asked.q, asked.k, asked.lengths)
        return Specification(problem, asked.q[0], tokens, self.mask, self.options.scale, asked.needs_grad)

    def _tokens(self, name: str, q: torch.Size, k: torch.Size, given: Sequence[int]) -> CallTokens:
        """The tokens of queries and keys of these shapes; checked here at run time, since lengths are SymInts during
        tracing.
        """
        mask, calls, kv_layout = self.mask.value, self.calls, self.options.kv_layout
        layout = self.options.layout or calls.layout
        W, rank = calls.transport.world_size, calls.transport.rank
        seq_len, q_start, q_len = given
        self_attention = q_start == 0 and q_len == -1 and kv_layout is None
        seq_len = lengths.seq_len_of(k, mask, W) if seq_len == -1 else seq_len
        if q_len == -1:
            q_len = q[1] * W if q_start else seq_len
        tokens = CallTokens(seq_len, q_start, q_len, kv_layout, self.options.layout)
        problem = (
            lengths.length_problem(name, q, mask, seq_len, layout, W, rank)
            if self_attention
            else lengths.length_problem("k", k, mask, seq_len, kv_layout or layout, W, rank)
            or lengths.chunk_problem(q, q_start, q_len, seq_len, mask, layout, W, rank)
        )
        problem = problem or lengths.rows_problem(mask, q[0], seq_len)
        return calls.refuse(problem) if problem is not None else tokens


@dataclass(eq=False)
class Template(_Numbered):
    """A call of a compiled graph, which becomes a recipe when the graph runs and its data are known."""

    form: Form

    def filled(self, data: Data) -> Recipe:
        try:
            mask, scale, softcap, dropout_p, kv_layout, layout = join(self.form, data)
        except ValueError as error:
            problem: str | None = str(error)
        else:
            problem = validation.numbers_problem(scale, softcap, dropout_p)
        if problem is not None:
            self.calls.refuse(problem)
        return self.calls.recipe_of_new(
            mask, Options(scale, softcap, dropout_p, kv_layout, layout, self.form.max_logits)
        )


def _values(x: Tensor | None) -> str:
    return "" if x is None else f"{x.dtype} {x.tolist()}"
