"""Context parallelism for layers that mix tokens without attention, by gathering their inputs.

State-space layers, gated delta nets and convolutions read tokens of other ranks. `gather_layers` runs each such layer
on the hidden states of the whole sequence, and keeps this rank's part of the result. Gradients of weights then add up
over ranks, and those of hidden states are reduce-scattered. Every rank does the layer's whole work, except for layers
that read a few previous tokens (`reach`), or whose heads are split (`split_heads`).

[Note: shapes] B batch, T local tokens, S global tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from distflash.context import ContextParallel
from distflash.integrations.transformers.batch import (
    KIND,
    NAME,
    PASS_ALL,
    SHIFTED,
    Shard,
    group_problem,
    require_same_batch,
)
from distflash.integrations.transformers.mixers import missing_mixers, mixers_of, tokens_before
from distflash.integrations.transformers.reach import Piece, reach
from distflash.integrations.transformers.split_heads import Kind, kind_of, run_split

# The attribute of a gathered layer with its `_Gathered` or `_Split`.
_MARK = "_distflash_gathered"

# Keywords that are not per token, or that layers do not read.
_IGNORED = ("labels", "shift_labels", "num_items_in_batch", SHIFTED)
_MASK = "attention_mask"
_MASKS = (_MASK, "padding_mask", "conv_mask")
_ROTARY = "position_embeddings"
_CACHES = ("cache_params", "past_key_values", "past_key_value", "state")


@dataclass(frozen=True)
class GatheredLayers:
    """The result of `gather_layers`. names: of the layers in the model. split: of those whose heads are split."""

    names: tuple[str, ...]
    split: tuple[str, ...]
    handles: tuple[RemovableHandle, ...]
    layers: tuple[nn.Module, ...] = field(repr=False)

    def remove(self) -> None:
        """Undo `gather_layers`."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            delattr(layer, _MARK)
            vars(layer).pop("forward", None)


def gather_layers(
    model: nn.Module,
    cp: ContextParallel,
    classes: Sequence[str | type[nn.Module]] | None = None,
    *,
    split_heads: bool = False,
) -> GatheredLayers:
    """Run a model's layers that mix tokens without attention on the whole sequence.

        dft.register(cp)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="distflash")
        dft.gather_layers(model, cp)

    Call it before the model is wrapped (FSDP, DDP). It uses hooks; parameters, their names and the config stay
    unchanged. Packed documents are run one by one, on the ranks that have tokens of them.

    Args:
        model: a Transformers model.
        cp: the group that `register` was given.
        classes: the layers' classes, or their names; None for known model types. For other types, name all classes
            that mix tokens, except attention: a missing one silently computes something else.

    Raises:
        ValueError: the model type is not known, or the model has no such layer.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp: expected the ContextParallel that register was given, got {type(cp).__name__}")
    names = _names(model, classes)
    found = {path: module for path, module in model.named_modules() if type(module).__name__ in names}
    missing = set(names) - {type(module).__name__ for module in found.values()}
    if missing:
        raise ValueError(f"classes: {type(model).__name__} has no layer of class {', '.join(sorted(missing))}")
    if forgotten := missing_mixers(model, found.values()):
        raise ValueError(
            f"classes: {type(model).__name__} mixes tokens by {', '.join(sorted(forgotten))} too, which would see this "
            "rank's tokens only; name all of them, or leave classes out"
        )
    if any(is_gathered(module) for module in found.values()):
        raise ValueError(
            "model: its layers are gathered already; call gather_layers once, or remove() what it returned"
        )
    batches = _Batches(cp)
    parents = {path.rpartition(".")[0] for path in found}
    handles = [handle for path in _above(found) for handle in batches.watch(model.get_submodule(path), path in parents)]
    kinds = {path: kind_of(module, cp.world_size) if split_heads else None for path, module in found.items()}
    for path, module in found.items():
        kind = kinds[path]
        handles += _Gathered(batches).hook(module) if kind is None else _Split(batches, kind).hook(module)
    split = tuple(path for path, kind in kinds.items() if kind is not None)
    return GatheredLayers(tuple(found), split, tuple(handles), tuple(found.values()))


def is_gathered(module: nn.Module) -> bool:
    """Whether a layer is gathered."""
    return hasattr(module, _MARK)


def gathered(model: nn.Module) -> list[nn.Module]:
    """The gathered layers of a model."""
    return [module for module in model.modules() if is_gathered(module)]


def _names(model: Any, classes: Any) -> tuple[str, ...]:
    if classes is None:
        return mixers_of(model)
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise ValueError(f"classes: expected classes of layers, or their names, in a list, got {classes!r}")
    return tuple(each if isinstance(each, str) else each.__name__ for each in classes)


def _above(paths: Mapping[str, nn.Module]) -> list[str]:
    """The paths of all modules that contain one of these, the model first."""
    above = {""}
    for path in paths:
        parts = path.split(".")
        above |= {".".join(parts[:n]) for n in range(1, len(parts))}
    return sorted(above)


@dataclass(frozen=True)
class _Batch:
    """A batch, and the attention mask of ones from `shard_batch`."""

    shard: Shard
    mask: Tensor | None


class _Batches:
    """Finds the batch of a running layer.

    Some layers get the batch's Shard as a keyword. Otherwise it is that of the enclosing module's running forward. When
    activation checkpointing recomputes a layer, no such forward runs; the batch is then found by its attention mask,
    which models pass to their layers. If a model passes None for a mask of ones, the enclosing module gets that mask.
    """

    def __init__(self, cp: ContextParallel) -> None:
        self.cp = cp
        self._running: list[_Batch] = []
        self._by_mask = WeakTensorKeyDictionary()
        self._compared: Shard | None = None

    def watch(self, module: nn.Module, holds_layer: bool) -> list[RemovableHandle]:
        """Track the batches of a module's forward. holds_layer: whether it calls a gathered layer directly."""
        return [
            module.register_forward_pre_hook(partial(self._enter, holds_layer), with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def of(self, given: Mapping[str, Any]) -> Shard:
        """The Shard of a layer with these arguments, after comparing it over the ranks."""
        shard: Shard | None = given.get(NAME)
        if not isinstance(shard, Shard):
            mask = given.get(_MASK)
            known = self._by_mask.get(mask) if isinstance(mask, Tensor) else None
            shard = known or (self._running[-1].shard if self._running else None)
        problem = _no_shard() if shard is None else group_problem(shard, self.cp)
        if problem is not None:
            self.cp.refuse(problem, KIND)
        assert shard is not None
        if shard is not self._compared:
            require_same_batch(shard, self.cp)
            self._compared = shard
        return shard

    def read(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], str, Shard]:
        """A layer's arguments by name, the name of its hidden states, and its batch."""
        parameters = list(inspect.signature(type(layer).forward).parameters)[1:]
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        shard = self.of(given)
        shard.trace.note(layer)
        if _ROTARY not in parameters:
            given.pop(_ROTARY, None)  # some enclosing layers pass it to all their layers
        problem = _problem(layer, given, parameters[0], shard)
        if problem is not None:
            self.cp.refuse(problem, KIND)
        return given, parameters[0], shard

    @torch.compiler.disable
    def _enter(self, holds_layer: bool, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        shard, mask = kwargs.get(NAME), kwargs.get(_MASK)
        if isinstance(shard, Shard):
            is_ones = isinstance(mask, Tensor) and mask.shape[1:] == (shard.seq_local,)
            before = self._running[-1].mask if self._running else None
            self._running.append(_Batch(shard, mask if is_ones else before))
            if is_ones:
                self._by_mask[mask] = shard
        elif self._running:
            self._running.append(self._running[-1])
        if holds_layer and self._running and _MASK in kwargs and mask is None:
            return args, {**kwargs, _MASK: self._running[-1].mask}
        return None

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:  # empty if there was no batch, or if another hook has raised before `_enter`
            self._running.pop()


class _Split:
    """A layer whose heads are split."""

    def __init__(self, batches: _Batches, kind: Kind) -> None:
        self._batches, self._kind = batches, kind

    def hook(self, layer: nn.Module) -> list[RemovableHandle]:
        """Replace a layer's forward by one on this rank's heads. Hooks could not prevent the forward on all heads."""
        setattr(layer, _MARK, self)
        vars(layer)["forward"] = partial(self._forward, layer)
        return []

    @torch.compiler.disable
    def _forward(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        given, hidden, shard = self._batches.read(layer, args, kwargs)
        return run_split(layer, self._kind, given[hidden], shard, self._batches.cp)


class _Gathered:
    """A layer that runs on gathered hidden states."""

    def __init__(self, batches: _Batches) -> None:
        self._batches, self._cp = batches, batches.cp
        # From one hook to the other: the arguments for other documents, and the rows to keep.
        self._others: list[dict[str, Any]] = []
        self._kept, self._lengths = torch.empty(0), list[int]()

    def hook(self, layer: nn.Module) -> list[RemovableHandle]:
        """Run a layer on the whole sequence."""
        setattr(layer, _MARK, self)
        return [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after, prepend=True),
        ]

    @torch.compiler.disable
    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given, hidden, shard = self._batches.read(layer, args, kwargs)
        seen = reach(tokens_before(layer), shard)
        fetch = partial(seen.fetch, shard=shard, cp=self._cp.with_layout(shard.layout))
        rows = {name: _each(given[name], fetch) for name in (hidden, _ROTARY) if name in given}
        pieces = seen.pieces(shard)
        calls = [_call({**given, **rows}, (*rows,), piece) for piece in pieces]
        self._kept = seen.kept(shard).to(rows[hidden].device)
        self._others, self._lengths = calls[1:], [len(piece.rows) for piece in pieces]
        return (), calls[0]

    @torch.compiler.disable
    def _after(self, layer: nn.Module, args: Any, output: Any) -> Any:
        outputs = [output, *(layer.forward(**call) for call in self._others)]
        self._others = []
        parts = tuple(self._part(each) for each in zip(*(_as_tuple(x) for x in outputs), strict=True))
        if parts[0] is None:
            self._cp.refuse(f"classes: {type(layer).__name__} returns no result for each token first", KIND)
        return parts if isinstance(output, tuple) else parts[0]

    def _part(self, outputs: Sequence[Any]) -> Any:
        """This rank's part of an output, given per piece as ``[B, rows, ...]``; None for others, such as states."""
        lengths = [x.shape[1] if isinstance(x, Tensor) and x.dim() > 1 else None for x in outputs]
        if lengths != self._lengths:
            return None
        return torch.cat(list(outputs), 1).index_select(1, self._kept)


def _call(given: Mapping[str, Any], per_token: Sequence[str], piece: Piece) -> dict[str, Any]:
    """The arguments for one piece, from those for all rows."""
    rows = slice(piece.rows.start, piece.rows.stop)
    call = {**given, **{name: _each(given[name], lambda x: x[:, rows]) for name in per_token}}
    call |= dict.fromkeys(name for name in _MASKS if name in given)  # none is padding, see shard_batch
    hidden = call[per_token[0]]
    if given.get("position_ids") is not None:
        end = piece.start + len(piece.rows)
        call["position_ids"] = torch.arange(piece.start, end, device=hidden.device).expand(len(hidden), -1)
    return call


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _each(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(_each(each, change) for each in x) if isinstance(x, tuple) else change(x)


def _problem(layer: nn.Module, given: Mapping[str, Any], hidden: str, shard: Shard) -> str | None:
    """Check that a layer can run on the whole sequence with these arguments."""
    name, x = type(layer).__name__, given.get(hidden)
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1] != shard.seq_local:
        came = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        return (
            f"{hidden}: {name} was called with {came}, expected [batch, {shard.seq_local}, ...], this rank's tokens; "
            "classes of gather_layers take hidden states first"
        )
    if any(given.get(cache) is not None for cache in _CACHES):
        return f"past_key_values: {name} cannot go on from a cache over several ranks; pass use_cache=False"
    if layer.training and (dropout := _dropout(layer)) is not None:
        return (
            f"dropout: {name} has dropout ({dropout}), which every rank would draw for itself; it is not supported in "
            "layers that see other ranks' tokens. Set it to 0, or call model.eval()"
        )
    known = {hidden, "position_ids", _ROTARY, NAME, *_MASKS, *_IGNORED}
    for other, value in given.items():
        if other not in known and _holds_tensors(value):
            return (
                f"{other}: {name} is given a tensor that gather_layers does not know how to make whole; it knows "
                f"{hidden}, position_ids, position_embeddings and masks. Name the class of a module within or around it"
            )
    return None


def _dropout(layer: nn.Module) -> str | None:
    """A description of a layer's dropout; None if it has none."""
    for path, module in layer.named_modules():
        for name, p in vars(module).items():
            is_probability = "dropout" in name or (name == "p" and isinstance(module, _DropoutNd))
            if is_probability and isinstance(p, float | int) and p > 0:
                return f"{path or type(layer).__name__}.{name} = {p}"
    return None


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensors, value)))


def _no_shard() -> str:
    return (
        "batch: nothing that shard_batch adds has reached the layers that gather_layers has changed; "
        f"{PASS_ALL}. If you did: activation checkpointing runs them again for a backward pass, and the model passes "
        "them neither its keywords nor its attention_mask, which is not supported. To use the model on one process, "
        "call remove() on what gather_layers returned"
    )
