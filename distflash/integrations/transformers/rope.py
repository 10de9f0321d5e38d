"""Checks of RoPE with length-dependent frequencies, which could differ between ranks.

Transformers computes the length as the largest position id + 1, and a rank has local position ids only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from distflash.integrations.transformers.batch import Shard


def rope_problem(config: Any, shard: Shard) -> str | None:
    """Check that all ranks use the frequencies of the whole sequence."""
    if shard.world_size == 1:
        return None
    kinds = {parameters["rope_type"]: parameters for parameters in _rope_parameters(config)}
    if not kinds.keys() & {"dynamic", "longrope"}:
        return None
    lengths = [_length(shard, rank) for rank in range(shard.world_size)]
    if "longrope" in kinds:
        limit = kinds["longrope"].get("original_max_position_embeddings") or config.max_position_embeddings
        if min(lengths) <= limit < max(lengths):
            own = " / ".join(map(str, lengths))
            return (
                f"rope_type: 'longrope' has other frequencies up to {limit} tokens than beyond, and the library "
                f"chooses by a rank's own last token: here that is number {own} on the ranks. "
                f"Use sequences of at most {limit} tokens, or of at least {limit + shard.world_size} in the layout "
                "df.Striped(), which has every rank's last token at the end of the sequence"
            )
    if "dynamic" in kinds:
        limit = config.max_position_embeddings
        if limit < max(lengths) and len(set(lengths)) > 1:
            return (
                f"rope_type: 'dynamic' computes its frequencies from the length where that is more than {limit} "
                "tokens, and the library takes a rank's own last token for it: here that is number "
                f"{' / '.join(map(str, lengths))} on the ranks. Use sequences of at most {limit} tokens, or a "
                "rope_type whose frequencies are fixed (yarn, linear, llama3)"
            )
    return None


def cached_rope_problem(config: Any, lengths: tuple[int, ...], tokens: int) -> str | None:
    """Check that ``tokens`` more tokens do not change the frequencies, by which cached keys have been rotated."""
    kinds = {parameters["rope_type"]: parameters for parameters in _rope_parameters(config)}
    longest = max(lengths, default=0)
    if "longrope" in kinds:
        limit = kinds["longrope"].get("original_max_position_embeddings") or config.max_position_embeddings
        if any(0 < length <= limit < length + tokens for length in lengths):
            return (
                f"rope_type: 'longrope' goes over to other frequencies behind {limit} tokens, by which the keys of the "
                f"{longest} that the ShardedCache has had are not rotated. Prefill a longer prompt in one chunk, or "
                f"stop at {limit} tokens (max_length)"
            )
    if "dynamic" in kinds and longest + tokens > config.max_position_embeddings:
        return (
            f"rope_type: 'dynamic' has other frequencies for every length above {config.max_position_embeddings} "
            "tokens, by which the keys of earlier ones are not rotated; with a ShardedCache it is not supported. Use a "
            "rope_type whose frequencies are fixed (yarn, linear, llama3)"
        )
    return None


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of the model's rotary embeddings: one for all layers, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in [parameters, *parameters.values()]:
        if isinstance(each, Mapping) and "rope_type" in each:
            yield each


def _length(shard: Shard, rank: int) -> int:
    """The length that Transformers computes on a rank: its largest position id + 1."""
    ids = shard.of_rank(rank).position_ids(torch.device("cpu"))
    return int(ids.max()) + 1 if len(ids) else 0
