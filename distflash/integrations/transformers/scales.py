"""Corrects Llama 4's query scale, which depends on positions that its layers count from 0 on each rank.

Layers without RoPE multiply the query at position ``i`` by ``log(floor((i + 1) / floor_scale) + 1) * attn_scale + 1``
(https://arxiv.org/abs/2501.19399). This factor is replaced by that of the position in the sequence or document.

[Note: shapes] B batch, T local tokens, H query heads, D head dim.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from distflash.integrations.transformers.batch import Shard

# Code that a layer's forward must contain for `rescaled`, without spaces.
_COUNTS = "positions=torch.arange(hidden_states.shape[1],device=hidden_states.device)+past_seen_tokens"
_SCALES = "torch.log1p(torch.floor((positions.float()+1.0)/self.floor_scale))*self.attn_scale+1.0"


def rescaled(layer: nn.Module, query: Tensor, shard: Shard) -> Tensor:
    """``query [B, H, T, D]`` scaled for the positions of ``shard``; unchanged if the layer does not scale."""
    if not scales_queries(layer):
        return query
    counted = torch.arange(query.shape[2], device=query.device) + shard.start
    ratio = _scale(layer, shard.position_ids(query.device)) / _scale(layer, counted)
    return (query * ratio[:, None]).to(query.dtype)


def scale_problem(model: nn.Module) -> str | None:
    """Check that layers that scale queries do so in the known way."""
    for kind in {type(module) for module in model.modules() if scales_queries(module)}:
        if not _is_known(kind):
            return (
                f"attn_temperature_tuning: {kind.__name__} scales queries by their position in another way than the "
                "versions of the library that are known here, and may count them within a rank's part; set "
                "config.attn_temperature_tuning = False, or use a version that distflash is tested with"
            )
    return None


def _is_known(kind: type[nn.Module]) -> bool:
    try:
        code = "".join(inspect.getsource(kind.forward).split())
    except OSError:  # no file: a notebook
        return False
    return _COUNTS in code and _SCALES in code


def scales_queries(layer: Any) -> bool:
    """Whether a layer scales queries by position."""
    return bool(getattr(layer, "attn_temperature_tuning", False)) and not getattr(layer, "use_rope", True)


def _scale(layer: Any, positions: Tensor) -> Tensor:
    return torch.log1p(torch.floor((positions.float() + 1.0) / layer.floor_scale)) * layer.attn_scale + 1.0
