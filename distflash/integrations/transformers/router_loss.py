"""The routers' load-balancing loss over all ranks' tokens.

The loss of Switch Transformers (https://arxiv.org/abs/2101.03961, equations 4 to 6), as in Mixtral:
``E * sum over experts of (fraction of tokens) * (mean probability)``. It is not a mean over tokens, so the mean of the
ranks' losses would be wrong. With the fractions of all ranks' tokens, it is linear in each token's probabilities.

[Note: shapes] B batch, T local tokens, L layers with routers, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from distflash import groups
from distflash.context import ALONE, ContextParallel
from distflash.integers import as_int
from distflash.integrations.transformers.loss import CausalLMLoss

# Code that a model's forward must contain for `with_router_loss`, without spaces.
_COMPUTES = (
    "aux_loss=load_balancing_loss_func(outputs.router_logits,self.num_experts,self.num_experts_per_tok,attention_mask,)"
)
_ADDS = "loss+=self.router_aux_loss_coef*aux_loss.to(loss.device)"

_NAME = "router loss"


def router_aux_loss(
    router_logits: Sequence[Tensor],
    num_experts: int,
    top_k: int,
    cp: ContextParallel,
    attention_mask: Tensor | None = None,
    *,
    reduction: Literal["sum", "mean"] = "mean",
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """Mixtral's load-balancing loss over all ranks' tokens. All ranks must call.

    Args:
        router_logits: ``output.router_logits``: for each layer with a router ``[B * T, E]``, of this rank's tokens.
        num_experts, top_k: E, and the number of experts per token.
        cp: the group that `register` was given.
        attention_mask: ``[B, T]`` of this rank's tokens, 0 for padding, which is not counted; None for no padding.
        reduction, group: as for `ContextParallel.mean`.

    Returns:
        Scalar, float32, the same on every rank. Gradients flow through the probabilities, not the fractions.

    Raises:
        ValueError: on every rank, if an argument is invalid on any, or if they differ.
    """
    problem = _problem(router_logits, num_experts, top_k, attention_mask)
    if problem is not None:
        cp.agreement.refuse(_NAME, others_compare=False)
        raise ValueError(problem)
    fields = {"layers": len(router_logits), "num_experts": num_experts, "top_k": top_k}
    cp.agreement.require(_NAME, lambda: fields, key=tuple(fields.values()))
    everyone = cp.transport if group is None else groups.wider_transport(group, cp.transport)
    counts, probabilities, tokens = _sums(router_logits, num_experts, top_k, attention_mask)
    total = everyone.all_reduce(torch.cat([counts, tokens[None]]))
    shares = total[:-1] / total[-1].clamp_min(1)
    loss_sum = num_experts * (shares.to(probabilities) * probabilities).sum()
    return cp.mean(loss_sum, tokens, reduction=reduction, group=group)


def with_router_loss(model: PreTrainedModel, output: Any, attention_mask: Tensor | None, cp: ContextParallel) -> Any:
    """Replace a model's auxiliary loss, which is of this rank's tokens, by that of all ranks' tokens."""
    how = model.loss_function if isinstance(model.loss_function, CausalLMLoss) else None
    reduction, group = ("mean", None) if how is None else (how.reduction, how.group)
    experts = model.num_experts, model.num_experts_per_tok
    loss = router_aux_loss(output.router_logits, *experts, cp, attention_mask, reduction=reduction, group=group)
    if output.loss is not None:
        difference = loss - output.aux_loss.to(loss.device)  # cancels the local loss and its gradient
        output.loss = output.loss + model.router_aux_loss_coef * difference.to(output.loss.device)
    output.aux_loss = loss
    return output


def router_loss_problem(model: PreTrainedModel, output: Any, attention_mask: Tensor | None) -> str | None:
    """Check that a model's auxiliary loss is the one implemented here."""
    name = type(model).__name__
    if not hasattr(output, "aux_loss"):
        return f"return_dict: {name} returns a tuple, in which the routers' auxiliary loss is not found; leave it True"
    if getattr(output, "router_logits", None) is None:
        return (
            f"output_router_logits: the {type(output).__name__} of {name} has no router_logits, of which the routers' "
            "auxiliary loss of all tokens could be made; in TRL's SFTTrainer set router_aux_loss_coef=0.0"
        )
    code = _code(model)
    if _COMPUTES in code and _ADDS in code:
        experts = model.num_experts, model.num_experts_per_tok
        alone = router_aux_loss(output.router_logits, *experts, ALONE, attention_mask)
        if torch.allclose(alone, output.aux_loss.to(alone), rtol=1e-3):
            return None
    return (
        f"output_router_logits: {name} computes its routers' auxiliary loss in a way that is not known here, so that "
        "it would be that of this rank's tokens only; leave it out, and add dft.router_aux_loss(...) to the loss"
    )


def wants_router_loss(model: PreTrainedModel, asked: Any) -> bool:
    """Whether a forward with ``output_router_logits=asked`` computes an auxiliary loss."""
    return asks_for_router_logits(model, asked) and "aux_loss" in _code(model)


def asks_for_router_logits(model: PreTrainedModel, asked: Any) -> bool:
    """Whether a forward with ``output_router_logits=asked`` returns router logits."""
    return bool(getattr(model.config, "output_router_logits", False) if asked is None else asked)


def _code(model: nn.Module) -> str:
    """The source of a model's forward, without spaces."""
    try:
        return "".join(inspect.getsource(type(model).forward).split())
    except OSError:  # no file: a notebook
        return "aux_loss"  # unknown, so assume that it has one


def _sums(
    router_logits: Sequence[Tensor], num_experts: int, top_k: int, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed over layers: tokens per expert ``[E]``, probabilities per expert ``[E]``, and the number of tokens."""
    device = router_logits[0].device
    counts = torch.zeros(num_experts, dtype=torch.float64, device=device)
    probabilities, tokens = torch.zeros(num_experts, device=device), torch.zeros((), dtype=torch.float64, device=device)
    for logits in router_logits:
        p = torch.softmax(logits.to(device), -1)
        kept = torch.ones(len(p), device=device) if attention_mask is None else attention_mask.flatten().to(p)
        chosen = p.detach().topk(top_k, -1).indices
        counts.scatter_add_(0, chosen.flatten(), kept.double().repeat_interleave(top_k))
        probabilities = probabilities + (p.float() * kept[:, None]).sum(0)
        tokens = tokens + kept.double().sum()
    return counts, probabilities, tokens


def _problem(router_logits: Any, num_experts: Any, top_k: Any, attention_mask: Any) -> str | None:
    experts, chosen = as_int(num_experts), as_int(top_k)
    if experts is None or chosen is None or not 1 <= chosen <= experts:
        return f"num_experts, top_k: expected numbers of experts, top_k at most all, got {num_experts!r}, {top_k!r}"
    is_list = isinstance(router_logits, Sequence) and len(router_logits) > 0
    if not is_list or not all(isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == experts for x in router_logits):
        return (
            f"router_logits: expected a tensor [tokens, {experts}] for each layer with a router, as in "
            f"output.router_logits of output_router_logits=True, got {_shapes(router_logits)}"
        )
    tokens = {len(x) for x in router_logits}
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or tokens != {attention_mask.numel()}):
        return (
            f"attention_mask: expected one number for each of this rank's {sorted(tokens)} tokens, got "
            f"{_shapes(attention_mask)}"
        )
    return None


def _shapes(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor {list(given.shape)}"
    return f"[{', '.join(map(_shapes, given))}]" if isinstance(given, list | tuple) else repr(given)
