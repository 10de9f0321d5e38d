"""Llama 4's scale of queries by their position, which its layers count from 0 on each rank.

Layers without RoPE multiply the query at position ``i`` by ``log(floor((i + 1) / floor_scale) + 1) * attn_scale + 1``
(https://arxiv.org/abs/2501.19399). What they have multiplied it by is replaced by what belongs to its position in the
sequence, or in its document.

[Note: shapes] B batch, T local tokens, H query heads, D head dim.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from distflash.integrations.transformers.batch import Shard

# What a layer's forward has to compute for `rescaled` to be right, without spaces.
_COUNTS = "positions=torch.arange(hidden_states.shape[1],device=hidden_states.device)+past_seen_tokens"
_SCALES = "torch.log1p(torch.floor((positions.float()+1.0)/self.floor_scale))*self.attn_scale+1.0"


def rescaled(layer: nn.Module, query: Tensor, shard: Shard) -> Tensor:
    """``query [B, H, T, D]`` as the layer would have scaled it by the positions of ``shard``; others as they are."""
    if not scales_queries(layer):
        return query
    counted = torch.arange(query.shape[2], device=query.device) + shard.start
    ratio = _scale(layer, shard.position_ids(query.device)) / _scale(layer, counted)
    return (query * ratio[:, None]).to(query.dtype)


def scale_problem(model: nn.Module) -> str | None:
    """Why it is not known by what a model's layers scale their queries; None if it is, or if they do not."""
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
    """Whether a layer scales queries by their position."""
    return bool(getattr(layer, "attn_temperature_tuning", False)) and not getattr(layer, "use_rope", True)


def _scale(layer: Any, positions: Tensor) -> Tensor:
    return torch.log1p(torch.floor((positions.float() + 1.0) / layer.floor_scale)) * layer.attn_scale + 1.0
