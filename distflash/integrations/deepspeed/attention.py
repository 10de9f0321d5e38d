"""Use distflash in existing layers without editing them.

- `replace_attention` replaces submodules that only compute attention, ``(q, k, v) -> out``, such as DeepSpeed's
  ``DistributedAttention`` or the module that it wraps.
- `redirect_attention` is for modules that call ``torch.nn.functional.scaled_dot_product_attention``. During their
  forward, that call is redirected to distflash.

Everything else in a layer stays unchanged. A layer that computes rotary embeddings from positions 0, 1, ... instead of
``cp.positions(seq_len)`` is wrong on all ranks but the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from distflash.api import attention
from distflash.context import ContextParallel
from distflash.dropout import of_layer
from distflash.mask_algebra import Mask
from distflash.rows import Rows

_LAYERS = 1 << 16  # more than a model has


@dataclass(frozen=True)
class Order:
    """The order of the first three dimensions of a module's q, k, v and out. The last is the head dim.

    ``Order()`` is ``[batch, tokens, heads, head_dim]``; Megatron's is ``Order(tokens=0, batch=1)``.
    """

    batch: int = 0
    tokens: int = 1
    heads: int = 2

    def __post_init__(self) -> None:
        if sorted((self.batch, self.tokens, self.heads)) != [0, 1, 2]:
            raise ValueError(f"{self}: expected batch, tokens and heads to be 0, 1 and 2 in some order")


class DistributedAttention(nn.Module):
    """Attention over a sequence that is sharded over ranks, as a module ``(q, k, v) -> out``.

    Args:
        cp: the ranks that share a sequence.
        mask: which keys a query sees.
        seq_len: the global length. Batches that were not sharded, or twice, have another one and raise.
        order: of the dimensions of q, k, v and out.

    Attributes:
        dropout_seed: of layers that are redirected to it and have attention dropout: an int from 0 to 2^40 - 1, such as
            the step, the same on all ranks of cp. Each layer makes its own of it. Set it once a step, before the first
            forward, and leave it until the last backward: checkpointed modules read it again.
    """

    dropout_seed: int | None = None

    def __init__(self, cp: ContextParallel, mask: Mask, *, seq_len: int, order: Order = Order()) -> None:
        super().__init__()
        self.cp, self.mask, self.seq_len, self.order = cp, mask, seq_len, order

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int | None = None,
        *others: Any,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query, key, value: this rank's tokens, four dimensions in ``order``; key and value may have fewer heads.
            batch_dim_idx: an argument of DeepSpeed's attention; must agree with ``order``.
            dropout_p, dropout_seed: as in `distflash.attention`.
            others, named: must be None, so that a caller's masks and rotary embeddings are not ignored.

        Returns:
            Four dimensions, in the same order.
        """
        given = [f"argument {n}" for n, x in enumerate(others, start=5) if x is not None]
        given += [name for name, x in named.items() if x is not None]
        if given:
            self.refuse(
                f"{', '.join(given)}: DistributedAttention takes q, k and v alone, and its mask when it is made; "
                "call it without, or apply rotary embeddings to q and k before"
            )
        order = self.order
        if batch_dim_idx not in (None, order.batch):
            self.refuse(f"batch_dim_idx: got {batch_dim_idx}, but {order} was given; make it with another Order")
        there = (order.batch, order.tokens, order.heads, 3)
        q, k, v = (x.permute(there) for x in self.four(query=query, key=key, value=value))
        out = attention(
            q, k, v, mask=self.mask, cp=self.cp, seq_len=self.seq_len, dropout_p=dropout_p, dropout_seed=dropout_seed
        )
        back = sorted(range(4), key=there.__getitem__)
        return out.permute(back)

    def refuse(self, problem: str) -> NoReturn:
        """Raise ``problem`` on all ranks."""
        self.cp.refuse(problem, in_attention=True)

    def four(self, **named: Tensor) -> Iterator[Tensor]:
        """The tensors. Raises if one does not have four dimensions."""
        for name, x in named.items():
            if x.dim() != 4:
                self.refuse(f"{name}: expected four dimensions, batch, tokens, heads and head dim, got {list(x.shape)}")
        yield from named.values()


def replace_attention(model: nn.Module, kind: type[nn.Module], attention: DistributedAttention) -> None:
    """Replace every submodule of class ``kind`` by ``attention``.

    Args:
        model: changed in place.
        kind: a class of modules that compute attention from q, k and v, without parameters.
        attention: the replacement.

    Raises:
        ValueError: there is none, or one has parameters, which would be lost. The model stays unchanged.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, kind)]
    for name in found:
        if next(model.get_submodule(name).parameters(), None) is not None:
            raise ValueError(
                f"kind: {name or 'the model itself'} has parameters, which would be lost; name the class of the "
                "module inside that computes attention from q, k and v, or use redirect_attention"
            )
    _require_some(found, model, kind)
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, attention)


def redirect_attention(
    model: nn.Module, kind: type[nn.Module], attention: DistributedAttention
) -> list[RemovableHandle]:
    """In every submodule of class ``kind``, redirect calls of ``scaled_dot_product_attention`` to ``attention``.

    Names of parameters, and so checkpoints, stay unchanged. Not for modules that use activation checkpointing inside
    their forward, since the recomputation runs outside of it; checkpoint the whole module instead.

    Args:
        model: its submodules get hooks.
        kind: a class whose forward calls torch's function with ``[batch, heads, tokens, head_dim]``, without attn_mask,
            and with an is_causal that matches the mask of ``attention``.
        attention: computes the calls; its `Order` is that of torch's function. If the modules have attention dropout,
            set its ``dropout_seed`` once a step.

    Returns:
        Handles; ``remove()`` of all of them undoes it.

    Raises:
        ValueError: there is none; or, at its forward: it does not call torch's function, or with other arguments.
    """
    expected = Order(batch=0, heads=1, tokens=2)
    if attention.order != expected:
        raise ValueError(f"attention: torch's function has {expected}, but it was made with {attention.order}")
    found = [module for module in model.modules() if isinstance(module, kind)]
    _require_some(found, model, kind)
    causal, handles = _is_causal(attention.mask, attention.seq_len), []
    for n, module in enumerate(found):
        redirection = _Redirection(attention, causal, n)
        handles.append(module.register_forward_pre_hook(redirection.enter))
        handles.append(module.register_forward_hook(redirection.leave, always_call=True))
    return handles


class _Redirection:
    """A module's hooks, which enter a mode before its forward and leave it after, also if it raises."""

    def __init__(self, attention: DistributedAttention, causal: bool, layer: int) -> None:
        self.attention, self.causal, self.layer = attention, causal, layer
        self.running: list[_Mode] = []

    def enter(self, module: nn.Module, inputs: Any) -> None:
        mode = _Mode(self.attention, self.causal, self.layer)
        mode.__enter__()
        self.running.append(mode)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        mode = self.running.pop()
        mode.__exit__(None, None, None)
        if not mode.calls and output is not None:  # None: the forward raised
            self.attention.refuse(
                f"kind: {type(module).__name__} made no call of scaled_dot_product_attention in its forward, so its "
                "attention would have been each rank's own; use replace_attention, or distflash.attention itself"
            )


class _Mode(TorchFunctionMode):
    def __init__(self, attention: DistributedAttention, causal: bool, layer: int) -> None:
        super().__init__()
        self.attention, self.causal, self.layer, self.calls = attention, causal, layer, 0

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        own = self.attention
        if attn_mask is not None:
            own.refuse(
                "attn_mask: is of this rank's tokens alone; leave it out, and give the mask as an object, such as "
                "df.Causal(), when DistributedAttention is made"
            )
        if is_causal != self.causal:
            own.refuse(
                f"is_causal: the layer calls attention with is_causal={is_causal}, but was given {own.mask!r}; give it "
                "the mask that it has, df.Causal() or df.Full(), by itself or & another"
            )
        q, k, v = (x.transpose(1, 2) for x in own.four(query=query, key=key, value=value))
        seed = self._seed() if dropout_p else None
        placed: dict[str, Any] = dict(mask=own.mask, cp=own.cp, seq_len=own.seq_len)
        out: Tensor = attention(q, k, v, scale=scale, dropout_p=dropout_p, dropout_seed=seed, **placed)
        return out.transpose(1, 2)

    def _seed(self) -> int:
        """Of this call in the module: the same when a checkpointed module is computed again."""
        seed = self.attention.dropout_seed
        if seed is None:
            self.attention.refuse(
                "dropout_p: the layer has attention dropout, for which all ranks need one seed; once a step "
                "set dropout_seed of the DistributedAttention to the step, or set the layer's dropout to 0"
            )
        try:
            return of_layer(seed, self.layer + (self.calls - 1) * _LAYERS)
        except ValueError as error:
            self.attention.refuse(str(error))


def _is_causal(mask: Mask, seq_len: int) -> bool:
    """Whether no query sees a later key."""
    if isinstance(mask, Rows):
        return all(_is_causal(each, seq_len) for each in mask.masks)
    positions = torch.arange(seq_len)
    parts = mask.parts(positions, seq_len)
    return all(bool(((hi <= lo) | (hi.clamp_max(seq_len) <= positions + 1)).all()) for lo, hi in parts)


def _require_some(found: list[Any], model: nn.Module, kind: type[nn.Module]) -> None:
    if not found:
        raise ValueError(f"kind: {type(model).__name__} has no {kind.__name__} in it; nothing would change")
