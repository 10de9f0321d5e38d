"""Derivatives that attention does not have, found before they come out as zeros.

The operation has a backward pass and nothing else. Forward-mode AD finds no rule, and takes that for a tangent of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

_INSTEAD = "use reverse mode: loss.backward() or torch.autograd.grad"


def problem(**arguments: object) -> str | None:
    """Whether any of these arguments asks for a derivative by other means than a backward pass; None if not.

    Costs two look-ups where no transform is active.
    """
    if torch.compiler.is_compiling():
        # Traced code cannot ask a tensor. It reads the level, which torch guards: where that changes, it traces again.
        if forward_ad._current_level >= 0:
            raise ValueError(f"q: forward-mode AD around attention would give a tangent of zero; {_INSTEAD}")
        return None
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    if forward_ad._current_level >= 0:
        for name, x in tensors.items():
            if forward_ad.unpack_dual(x).tangent is not None:
                return (
                    f"{name}: has a tangent of forward-mode AD (torch.func.jvp, jacfwd, hessian, dual numbers), which "
                    f"attention would drop; {_INSTEAD}"
                )
    if _functorch.peek_interpreter_stack() is not None and _is_in_grad():
        for name, x in tensors.items():
            if _functorch.is_functorch_wrapped_tensor(x):
                return (
                    f"{name}: is differentiated by torch.func (grad, vjp, jacrev), which attention does not support; "
                    f"{_INSTEAD}"
                )
    return None


def _is_in_grad() -> bool:
    stack = _functorch.get_interpreter_stack() or ()
    return any(level.key() == _functorch.TransformType.Grad for level in stack)
