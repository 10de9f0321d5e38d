"""Sharding of batches: a rank's part, and what the layers need to know of the whole batch.

[Note: shapes] B batch, T local tokens, S global tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from distflash.context import ContextParallel
from distflash.dropout import of_layer
from distflash.integrations.labels import IGNORED, are_shifted, are_tokens, digest, shift
from distflash.integrations.transformers.shifting import as_shifts, shard_shifted
from distflash.layouts import Layout
from distflash.masks import Causal, Documents

# The name in attn_implementation, and the keyword of the batch's Shard, which models pass on to the attention.
NAME = "distflash"

# Another name in attn_implementation, for models that refuse names with "flash" in them.
OTHER_NAME = "context_parallel"
NAMES = (NAME, OTHER_NAME)

_TYPES = ("token_type_ids", "mm_token_type_ids")
# Models use these for their masks only, so they get those of the whole sequence.
_FOR_MASKS = ("mm_token_type_ids",)
_PER_TOKEN = ("input_ids", *_TYPES)
_WHOLE = ("labels", "shift_labels", "attention_mask")
_BOUNDARIES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
# Computed from the boundaries.
_DERIVED = ("max_length_q", "max_length_k", "seq_idx")
# Prefixes of the names of images, video and audio.
_MEDIA = ("pixel", "image", "video", "audio", "input_features", "mm_")
_KNOWN = (*_PER_TOKEN, *_WHOLE, *_BOUNDARIES, *_DERIVED, "position_ids", "num_items_in_batch", "dropout_seed")

# The kind of the agreement that compares a batch over the ranks.
KIND = "Transformers batch"

# The keyword of tokens and labels that are shifted further. Models pass it on without reading it.
SHIFTED = "shifted"

OUR_CACHE = "past_key_values=distflash.integrations.transformers.ShardedCache(cp)"
PASS_ALL = "pass the model all that shard_batch(batch, cp) returns: model(**shard_batch(batch, cp))"
_LABELS_READ = (
    "labels: this model's loss reads `labels`, and would shift them within each rank's part, or not at all. The "
    "labels, shifted in the whole sequence, are in `shift_labels`: set model.loss_function = loss_function(cp) if the "
    "model uses one, or leave labels out of the call and compute the loss from the logits and shift_labels. If the "
    "loss is not that of the next token, leave labels out of the batch and take this rank's by cp.shard(labels)"
)
_NO_LABELS = (
    "labels: the batch had none when it was sharded. Labels have to be shifted in the whole sequence, before it is "
    "sharded: put them into the batch that shard_batch is given"
)


class _Trace:
    """Which layers have used distflash's attention with this part of a batch."""

    def __init__(self) -> None:
        self.layers: WeakSet[nn.Module] = WeakSet()
        self.compiled = False  # whether a compiled layer has; it cannot say which one it is

    def __reduce__(self) -> tuple[type[_Trace], tuple[()]]:
        return _Trace, ()  # a copy, as from a data loader's worker, starts empty

    @property
    def attended(self) -> bool:
        return self.compiled or bool(self.layers)

    def note(self, layer: nn.Module) -> None:
        """A layer has attended."""
        if torch.compiler.is_compiling():
            self.compiled = True
        else:
            self.layers.add(layer)


@dataclass(frozen=True)
class Shard:
    """Which part of a batch a rank has, and what the layers need to know of the whole batch.

    documents: the packed documents; None for one. contents: by name, digests of what has to be equal on all ranks.
    start: the position of the first token, after those in a cache. dropout_seed: of attention dropout, see
    `of_layer`. trace: which layers have used it.
    """

    layout: Layout
    world_size: int
    rank: int
    seq_len: int
    documents: Documents | None
    contents: tuple[tuple[str, str], ...] = ()
    start: int = 0
    dropout_seed: int | None = None
    trace: _Trace = field(default_factory=_Trace, compare=False, repr=False)

    @property
    def seq_local(self) -> int:
        """How many tokens this rank holds."""
        return self.layout.length(self.seq_len, self.world_size, self.rank)

    def of_rank(self, rank: int) -> Shard:
        """The part of another rank of the same batch."""
        return replace(self, rank=rank)

    def position_ids(self, device: torch.device) -> Tensor:
        """int64 ``[T]``: the position of each of this rank's tokens in its document."""
        positions = self.layout.positions(self.seq_len, self.world_size, self.rank).to(device)
        if self.documents is None:
            return positions + self.start
        return positions - self.documents.ends(positions, self.seq_len)[0]

    def require_attended(self) -> None:
        """Raise if no layer has used distflash's attention before the loss is computed."""
        if not self.trace.attended:
            raise ValueError(
                "attn_implementation: the batch was sharded, but no layer of the model has used distflash, so that "
                'each rank attended to its own tokens only; give the model attn_implementation="distflash" after '
                "register(cp). The library may have put another in its place: see model.config._attn_implementation"
            )


def group_problem(shard: Shard, cp: ContextParallel) -> str | None:
    """Whether a batch was sharded for another group or rank."""
    layout = for_documents(cp, shard.documents).layout
    if (shard.layout, shard.world_size, shard.rank) == (layout, cp.world_size, cp.rank):
        return None
    return (
        f"batch: was sharded for rank {shard.rank} of {shard.world_size}, {shard.layout!r}, but {cp!r} is registered; "
        "pass shard_batch the same cp as register"
    )


def for_documents(cp: ContextParallel, documents: Documents | None) -> ContextParallel:
    """The group with its layout for a batch; `Balanced` depends on the batch."""
    return cp.with_mask(Causal() if documents is None else Causal() & documents)


def require_same_batch(shard: Shard, cp: ContextParallel) -> None:
    """Raise on every rank if they were given different batches. All ranks must call."""
    try:
        cp.agree(KIND, seq_len=shard.seq_len, documents=shard.documents, **dict(shard.contents))
    except ValueError as difference:
        raise ValueError(
            f"{difference}. Every rank of a context-parallel group has to be given the same whole batch: samplers "
            "go by the data-parallel rank, and shard_batch is called once, on what they return"
        ) from None


def shard_batch(
    batch: Mapping[str, Any], cp: ContextParallel, whole: Sequence[str] = (), shifts: Sequence[int] = ()
) -> dict[str, Any]:
    """This rank's part of a batch, to be passed on to the model: ``model(**shard_batch(batch, cp))``.

    It does not communicate, so it can run in a data loader's worker. (The model's first layer compares the batch over
    the ranks.)

    Args:
        batch: the output of a tokenizer or collator, the same whole batch on every rank of ``cp``: tensors ``[B, S]``
            by name. ``input_ids``, and optionally: ``labels`` (not shifted, as Transformers expects) or
            ``shift_labels`` (shifted); ``position_ids`` that restart at 0 at each packed document, or ``cu_seqlens``
            (also ``cu_seq_lens_q``) ``[documents + 1]``; ``attention_mask`` of ones; ``token_type_ids`` or
            ``mm_token_type_ids``; ``num_items_in_batch``, which divides the sum of the losses instead of the number of
            this batch's labels; and ``dropout_seed``, which attention dropout needs in training: an int from 0 to
            2^40 - 1, such as the step, and another one for each data-parallel rank.
        cp: the group that `register` was given.
        whole: ``("token_type_ids",)`` for models that make their mask of them (images in Gemma 3, the prefix in
            PaliGemma), since a mask needs the types of all tokens. Models that look them up in an embedding (BERT) need
            those of this rank's tokens.
        shifts: the numbers of tokens by which to shift tokens and labels as well, for heads that predict several
            tokens: with ``(1, 2)`` a module gets ``tokens[1]`` and its loss ``labels[2]``. Nothing is shifted across
            documents.

    Returns:
        This rank's ``input_ids, position_ids, attention_mask`` (and ``token_type_ids, shift_labels``) ``[B, T]``; the
        entries in ``whole`` and ``mm_token_type_ids``, unchanged; and entries that the attention and the loss need.
        The model's loss is this rank's share: the mean over ranks of ``loss``, and of its gradients, is that of the
        whole batch. `loss_function` returns that mean itself. With ``shifts`` also ``shifted``, a `Shifted` with
        ``tokens`` and ``labels [B, T]`` by shift.

    Raises:
        ValueError: the batch has been sharded before, has padding, or has entries that cannot be sharded.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp: expected the ContextParallel that register was given, got {type(cp).__name__}")
    given = _checked(batch)
    as_is, shifts = {*_FOR_MASKS, *_as_types(whole)}, as_shifts(shifts)
    ids = given["input_ids"]
    B, S = ids.shape
    documents = _documents(given, S)
    cp = for_documents(cp, documents)
    _require_tokens(ids, cp)
    labels = _shifted_labels(given)
    compared = {"input_ids": ids, "labels": labels, **{name: given.get(name) for name in _TYPES}}
    contents = tuple((name, "" if x is None else digest(x)) for name, x in compared.items())
    seed = given.get("dropout_seed")
    seed = None if seed is None else of_layer(seed, 0)
    contents = (*contents, ("shifts", str(shifts)), ("dropout_seed", str(seed)))
    shard = Shard(cp.layout, cp.world_size, cp.rank, S, documents, contents, dropout_seed=seed)
    per_token = {name: given[name] for name in _PER_TOKEN if given.get(name) is not None}
    part: dict[str, Any] = {name: x if name in as_is else cp.shard(x) for name, x in per_token.items()}
    part |= {
        "position_ids": shard.position_ids(ids.device).expand(B, -1),
        # Without an attention_mask, Transformers would mistake a zigzag's positions for packed documents.
        "attention_mask": torch.ones_like(part["input_ids"]),
        "use_cache": False,
        NAME: shard,
    }
    if shifts:
        part[SHIFTED] = shard_shifted(given, cp, documents, shifts)
    if labels is None:
        return {**part, "num_items_in_batch": _Unreadable(_NO_LABELS)}
    count = given.get("num_items_in_batch")
    count = (labels != IGNORED).sum() if count is None else _count(count)
    return {
        **part,
        "labels": _Unreadable(_LABELS_READ),
        "shift_labels": cp.shard(labels),
        "num_items_in_batch": _Divisor(count / cp.world_size, shard),
    }


def shard_labels(labels: Tensor, cp: ContextParallel) -> Tensor:
    """This rank's part ``[B, T]`` of unsharded ``labels [B, S]``, shifted, to be passed as ``shift_labels``.

    They are shifted before they are sharded, so no label is lost at the end of a shard.
    """
    return cp.shard(shift(labels))


def shard_position_ids(seq_len: int, cp: ContextParallel, documents: Documents | None = None) -> Tensor:
    """int64 ``[T]``: the position of each of this rank's tokens in the sequence, or in its document."""
    shard = Shard(for_documents(cp, documents).layout, cp.world_size, cp.rank, seq_len, documents)
    return shard.position_ids(cp.transport.device)


@dataclass(frozen=True)
class _Divisor:
    """The divisor of the sum of this rank's losses; it raises if that sum would be wrong."""

    value: Tensor
    shard: Shard

    def __rtruediv__(self, loss_sum: Tensor) -> Tensor:
        self.shard.require_attended()
        return loss_sum / self.value.to(loss_sum.device)


def _count(given: Any) -> Tensor:
    """``num_items_in_batch``, as Transformers gives it: a number, or a tensor of one."""
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number and not (isinstance(given, Tensor) and given.numel() == 1):
        raise ValueError(f"num_items_in_batch: expected a number, got {_shape(given)}")
    return torch.as_tensor(given).reshape(())


class Misuse(ValueError, AttributeError):
    """Also an AttributeError, so that `hasattr` returns False."""


@dataclass(frozen=True)
class _Unreadable:
    """A placeholder for a value that must not be read. Reading it raises ``reason``."""

    reason: str = ""  # the default lets pickle ask a new object for its attributes

    def _refuse(self, *_: Any) -> Any:
        raise Misuse(self.reason)

    __getattr__ = __getitem__ = __rtruediv__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        raise Misuse(next(x.reason for x in given if isinstance(x, cls)))


def _as_types(whole: Any) -> Sequence[str]:
    if isinstance(whole, str) or not isinstance(whole, Sequence) or not set(whole) <= set(_TYPES):
        raise ValueError(f"whole: expected names among {', '.join(_TYPES)}, as in ('token_type_ids',), got {whole!r}")
    return whole


def _checked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as a dict of tensors ``[B, S]``, or the reason why it cannot be sharded."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch: expected tensors by name, as a collator returns them, got {type(batch).__name__}")
    whole = dict(batch)
    if NAME in whole:
        raise ValueError("batch: has been sharded already; call shard_batch once, on the whole batch")
    _require_known(whole)
    ids = whole.get("input_ids")
    if ids is None:
        raise ValueError("batch: has no input_ids, a tensor [batch, seq_len]")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(
            f'input_ids: expected a tensor [batch, seq_len], got {_shape(ids)}; ask for return_tensors="pt"'
        )
    for name in (*_PER_TOKEN, *_WHOLE):
        x = whole.get(name)
        if x is not None and (not isinstance(x, Tensor) or x.shape != ids.shape):
            raise ValueError(f"{name}: expected a tensor {list(ids.shape)}, as input_ids, got {_shape(x)}")
        if x is not None and name != "attention_mask" and (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"{name}: expected integers, got {x.dtype}")
    ones = whole.get("attention_mask")
    if ones is not None and not bool((ones == 1).all()):
        raise ValueError(
            "attention_mask: has other values than 1; padding and masks of your own are not supported. Pack the "
            "sequences instead of padding them (transformers.DataCollatorWithFlattening), or cut them to one length"
        )
    return whole


def _require_known(whole: Mapping[str, Any]) -> None:
    unknown = [name for name in whole if name not in _KNOWN]
    if media := [name for name in unknown if str(name).startswith(_MEDIA)]:
        raise ValueError(
            f"batch: holds {', '.join(map(repr, media))}; images, video and audio are not supported, since a rank has "
            "a part of the tokens that stand for them. Embed the whole batch with them, and pass the model "
            "inputs_embeds=cp.shard(embeds) in place of input_ids (docs/transformers.md), or leave them out"
        )
    if unknown:
        raise ValueError(
            f"batch: holds {', '.join(map(repr, map(str, unknown)))}, which shard_batch does not know how to shard; it "
            f"knows {', '.join(_KNOWN)}. Leave the others out, or pass them to the model yourself"
        )


def _require_tokens(ids: Tensor, cp: ContextParallel) -> None:
    """Asked of all ranks' parts on every rank, so that all of them raise."""
    B, S = ids.shape
    empty = [rank for rank in range(cp.world_size) if cp.layout.length(S, cp.world_size, rank) == 0]
    if B == 0 or empty:
        where = f", which leaves {len(empty)} of {cp.world_size} ranks without a token" if empty else ""
        raise ValueError(
            f"input_ids: {B} sequences of {S} tokens{where}; models cannot run on no tokens. Use longer sequences, or "
            "fewer ranks that hold one together"
        )


def _shape(x: Any) -> object:
    return list(x.shape) if isinstance(x, Tensor) else type(x).__name__


def _documents(whole: Mapping[str, Any], seq_len: int) -> Documents | None:
    """Where documents end, by whatever tells it; None for one document."""
    told = {name: Documents(whole[name]) for name in _BOUNDARIES if whole.get(name) is not None}
    if whole.get("position_ids") is not None:
        told["position_ids"] = _documents_of(whole["position_ids"], *whole["input_ids"].shape)
    if len(set(told.values())) > 1:
        raise ValueError(f"batch: {' and '.join(told)} tell of different documents; give one of them")
    for name, documents in told.items():
        if documents.seq_len != seq_len:
            raise ValueError(f"{name}: ends at {documents.seq_len}, but the sequence has {seq_len} tokens")
        return documents if len(documents.cu_seqlens) > 2 else None
    return None


def _documents_of(position_ids: Any, batch: int, seq_len: int) -> Documents:
    """Documents begin where positions are 0; anything but counting up from there is refused."""
    shapes = ((batch, seq_len), (1, seq_len), (seq_len,))
    if not isinstance(position_ids, Tensor) or position_ids.shape not in shapes:
        raise ValueError(
            f"position_ids: expected a tensor [{batch}, {seq_len}], as input_ids, got {_shape(position_ids)}"
        )
    rows = position_ids.reshape(-1, seq_len)
    row = rows[0]
    if not bool((rows == row).all()):
        raise ValueError(
            "position_ids: the sequences of the batch are packed differently, but one mask serves all of them; pack "
            "them into one sequence (transformers.DataCollatorWithFlattening)"
        )
    starts = (row == 0).nonzero().flatten()
    index = torch.arange(seq_len, device=row.device)
    if not len(starts) or starts[0] or not torch.equal(row, index - starts[(row == 0).cumsum(0) - 1]):
        raise ValueError(
            "position_ids: expected 0, 1, 2, ... that restart at 0 where a packed document begins, got positions that "
            "jump elsewhere; was this batch sharded already? shard_batch wants the whole batch on every rank"
        )
    return Documents([*starts.tolist(), seq_len])


def _shifted_labels(whole: Mapping[str, Any]) -> Tensor | None:
    """The shifted labels. Raises a ValueError if labels are clearly not what their key says."""
    ids, shifted = whole["input_ids"], whole.get("shift_labels")
    given = whole.get("labels") if shifted is None else shifted
    if given is None:
        return None
    if shifted is not None and are_tokens(given, ids):
        raise ValueError("shift_labels: are the tokens themselves, not those that follow; pass them as labels")
    if shifted is None and are_shifted(given, ids):
        raise ValueError("labels: are the tokens that follow, so shifted already; pass them as shift_labels")
    return shift(given) if shifted is None else shifted
