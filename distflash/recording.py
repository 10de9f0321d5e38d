"""Records the values of one training step: its loss, the outputs of its modules, and all gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as hooks

# Parts of parameter names that wrappers add: torch.compile, FSDP1, checkpoint_wrapper.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Event:
    """An input or output tensor of a module.

    ``module`` is empty for the root; ``call`` counts calls of the module, ``part`` the tensors of one input or output.
    """

    module: str
    returned: bool
    call: int = 0
    part: int = 0

    @property
    def name(self) -> str:
        """The name in reports."""
        name = self.module or "model"
        return name + (f" (call {self.call + 1})" if self.call else "") + (f"[{self.part}]" if self.part else "")

    @property
    def where(self) -> str:
        """The code that computes this tensor: a module, or its parent before it calls the module."""
        if self.returned:
            return self.name
        parent = self.module.rpartition(".")[0] or "model"
        return f"{parent}, in what it does before it calls {self.name}" if self.module else "the input of the model"


@dataclass
class Run:
    """The values of one run on one rank.

    Attributes:
        loss: scalar, on the CPU.
        events: the root's outputs, or inputs and outputs of all modules, on the CPU, in the order of execution.
        returned: tensors that step returned besides the loss.
        gradients: by parameter, unsharded, on the parameter's device.
        parts: by parameter, the 2-norm of this rank's gradient before the reduction over ranks.
        averaged: whether a wrapper (DDP, FSDP, DeepSpeed) averages gradients over the ranks.
        roots: the modules that were called from outside of any module.
        eps: the largest machine epsilon of the floating dtypes in use.
    """

    loss: Tensor
    events: dict[Event, Tensor]
    returned: list[Tensor]
    gradients: dict[str, Tensor]
    parts: dict[str, float]
    averaged: bool
    roots: list[nn.Module]
    eps: float


@dataclass
class Recorder:
    """Records the modules that this thread calls, through torch's hooks for all modules.

    Args:
        model: the only root; None for every module that is called from outside of any.
        layers: record inputs and outputs of all modules, not only the roots' outputs.
        inputs: leaf tensors that require a gradient, by name, compared like parameters.
    """

    model: nn.Module | None
    layers: bool
    inputs: Mapping[str, Tensor]
    roots: list[nn.Module] = field(default_factory=list)
    events: dict[Event, Tensor] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)
    _names: dict[nn.Module, str] = field(default_factory=dict)
    _calls: dict[nn.Module, int] = field(default_factory=dict)
    _stack: list[nn.Module] = field(default_factory=list)
    _before: dict[Tensor, Tensor | None] = field(default_factory=dict)
    _parts: dict[str, Tensor] = field(default_factory=dict)
    _hooked: set[Tensor] = field(default_factory=set)
    _versions: dict[Tensor, int] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _thread: int = field(default_factory=threading.get_ident)

    def __enter__(self) -> Recorder:
        for name, x in self.inputs.items():
            self._set_gradient_aside(x)
            self._measure_part(name, x)
        if self.model is not None:
            self._add_root(self.model)
        self._handles = [
            hooks.register_module_forward_pre_hook(self._called),
            hooks.register_module_forward_hook(self._returned),
        ]
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop recording, and restore gradients."""
        for handle in self._handles:
            handle.remove()
        for p, gradient in self._before.items():
            if gradient is not None and p.grad is not None:
                p.grad.copy_(gradient)  # in place: it may be a view of a buffer of all gradients
            else:
                p.grad = gradient

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that require a gradient, by name."""
        for root in self.roots:
            prefix = self._prefix(root)
            for name, p in root.named_parameters():
                if p.requires_grad:
                    yield prefix + _plain(root, name), p

    def has_gradients(self) -> bool:
        """Whether backward has been called."""
        tensors = [*self.inputs.values(), *(p for _, p in self.parameters())]
        return any(x.grad is not None and bool(_local(x.grad).count_nonzero()) for x in tensors)

    def require_same_weights(self) -> None:
        """Raise a ValueError if the step has changed the weights: later runs would be of another model."""
        changed = [name for name, p in self.parameters() if p._version != self._versions[p]]
        if changed:
            raise ValueError(f"step: changed the weights, {changed[0]} among them; leave the optimizer out of it")

    def run(self, loss: Tensor, returned: list[Tensor], gradients: Mapping[str, Tensor] | None) -> Run:
        """The recorded run. All ranks call, since gradients under FSDP are gathered.

        gradients: in place of ``p.grad``.
        """
        leaves: list[tuple[str, Tensor]] = [*self.inputs.items(), *self.parameters()]
        if gradients is None:
            gradients = {name: _gradient(x) for name, x in leaves}
        dtypes = self.dtypes | {x.dtype for _, x in leaves} | {x.dtype for x in (loss, *returned)}
        return Run(
            loss=loss.detach().cpu(),
            events=self.events,
            returned=[x.detach().to("cpu", copy=True) for x in returned],
            gradients={name: x.detach().clone() for name, x in gradients.items()},
            parts={name: float(norm) for name, norm in self._parts.items()},
            averaged=any(isinstance(p, DTensor) for _, p in self.parameters()) or any(map(_is_wrapper, self.roots)),
            roots=self.roots,
            eps=max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point),
        )

    def _add_root(self, root: nn.Module) -> None:
        self.roots.append(root)
        prefix = self._prefix(root)
        for name, module in root.named_modules():
            self._names.setdefault(module, (prefix + _plain(root, name)).removesuffix("."))
        for _, p in self.parameters():
            self._set_gradient_aside(p)
            self._versions.setdefault(p, p._version)

    def _prefix(self, root: nn.Module) -> str:
        """The prefix of a root's names: empty for the first root."""
        number = self.roots.index(root)
        return f"{type(root).__name__}#{number}." if number else ""

    def _set_gradient_aside(self, x: Tensor) -> None:
        if x not in self._before:
            self._before[x] = None if x.grad is None else x.grad.clone()
            if x.grad is not None:
                x.grad.zero_()

    def _called(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._is_foreign():
            return
        if not self._stack and self.model is None and module not in self._names:
            self._add_root(module)
        # An empty stack and no root: activation checkpointing recomputes a layer in backward.
        if module in self._names and (self._stack or module in self.roots):
            self._stack.append(module)
            if self.layers and len(self._stack) > 1:
                self._keep(module, False, arguments)

    def _returned(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._is_foreign() or not self._stack or self._stack[-1] is not module:
            return
        self._stack.pop()
        # Here, because FSDP has now gathered the module's parameters, whose gradients are not reduced yet.
        for name, p in module.named_parameters(recurse=False):
            self._measure_part(f"{self._names[module]}.{name}".removeprefix("."), p)
        if self.layers or not self._stack:
            self._keep(module, True, output)
        self._calls[module] = self._calls.get(module, 0) + 1
        self.dtypes |= {x.dtype for x in tensors_in(output)}

    def _measure_part(self, name: str, x: Tensor) -> None:
        if x in self._hooked or not x.requires_grad:
            return

        def add(gradient: Tensor) -> None:
            norm = torch.linalg.vector_norm(_local(gradient).double())
            self._parts[name] = self._parts.get(name, torch.zeros_like(norm)) + norm

        self._hooked.add(x)
        self._handles.append(x.register_hook(add))

    def _keep(self, module: nn.Module, returned: bool, value: Any) -> None:
        call = self._calls.get(module, 0)
        for part, x in enumerate(tensors_in(value)):
            if x.is_floating_point():
                self.events[Event(self._names[module], returned, call, part)] = whole(x.detach()).to("cpu", copy=True)

    def _is_foreign(self) -> bool:
        """Whether the call is another thread's (a simulated rank), or part of a compilation."""
        return torch.compiler.is_compiling() or threading.get_ident() != self._thread


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [x for item in value for x in tensors_in(item)]
    return []


def whole(x: Tensor) -> Tensor:
    """The full tensor of a DTensor. All ranks must call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _gradient(x: Tensor) -> Tensor:
    """The gradient, unsharded; zeros for None."""
    return torch.zeros_like(whole(x.detach())) if x.grad is None else whole(x.grad.detach())


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _plain(root: nn.Module, name: str) -> str:
    """A parameter's or module's name without the parts that wrappers add, such as DDP's ``module``."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if _is_wrapper(root) and parts and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _is_wrapper(root: nn.Module) -> bool:
    """Whether it is a wrapper, like DDP's and DeepSpeed's: its only child is ``module``."""
    return [name for name, _ in root.named_children()] == ["module"]


@torch.no_grad()
def nudge(roots: Sequence[nn.Module], eps: float, seed: int) -> Callable[[], None]:
    """Multiply every weight by 1 + eps or 1 - eps at random, the same on every rank. Returns a function to undo it."""
    before = [(p, _local(p.detach()).clone()) for root in roots for p in root.parameters() if p.is_floating_point()]
    for number, (p, old) in enumerate(before):
        generator = torch.Generator().manual_seed(seed * len(before) + number)
        signs = torch.randint(0, 2, old.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        _local(p.detach()).mul_(1 + eps * signs.to(old))

    @torch.no_grad()
    def undo() -> None:
        for p, old in before:
            _local(p.detach()).copy_(old)

    return undo
