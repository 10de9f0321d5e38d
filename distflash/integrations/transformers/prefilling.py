"""Chunked prefill of a prompt, each chunk sharded over the ranks.

[Note: shapes] B batch, S tokens of the prompt, n of a chunk, T local ones of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distflash.decode_step import MOST_TOKENS
from distflash.integers import as_int
from distflash.integrations.labels import digest
from distflash.integrations.transformers.batch import KIND, NAME, NAMES, Shard
from distflash.integrations.transformers.cached_layer import Sequences
from distflash.integrations.transformers.one_rank import generating
from distflash.integrations.transformers.scales import scales_queries

if TYPE_CHECKING:
    from distflash.integrations.transformers.sharded_cache import ShardedCache


def prefill(
    cache: ShardedCache, model: PreTrainedModel, ids: Tensor, chunk: int | None, attention_mask: Tensor | None
) -> None:
    """See `ShardedCache.prefill`."""
    sequences = cache.sequences
    cache.forget_unfinished()
    padding = None if _shape_problem(ids, attention_mask) else _padding(ids, attention_mask)
    problem = _shape_problem(ids, attention_mask) or _problem(cache, model, ids, chunk, padding)
    if problem is not None:
        sequences.cp.refuse(problem, KIND)
    assert padding is not None
    sequences.batch, sequences.padding = len(ids), padding if any(padding) else ()
    sequences.expected, sequences.prompt = max(sequences.expected, ids.shape[1]), ids.clone()
    if not sequences.padding:
        _run(cache, model, ids, chunk)
        return
    for row, padded in enumerate(padding):
        with _one_sequence(cache, row):
            _run(cache, model, ids[row : row + 1, padded:], chunk)


def _run(cache: ShardedCache, model: PreTrainedModel, ids: Tensor, chunk: int | None) -> None:
    """Run the tokens of ``ids [B, S]``, without padding, that are not in the cache, except the last one."""
    cp = cache.sequences.cp
    rest = ids[:, cache.get_seq_length() : -1]
    for part in rest.split(chunk or max(1, rest.shape[1]), dim=1):
        shortest = min(cp.layout.length(part.shape[1], cp.world_size, rank) for rank in range(cp.world_size))
        if shortest:
            _run_shard(cache, model, part)
        else:  # models cannot run on 0 tokens
            for few in part.split(MOST_TOKENS, dim=1):
                _run_everywhere(cache, model, few)


def _run_shard(cache: ShardedCache, model: PreTrainedModel, ids: Tensor) -> None:
    """Run a chunk ``[B, n]``, sharded to ``[B, T]``."""
    cp, start = cache.sequences.cp, cache.get_seq_length()
    contents = (("input_ids", digest(ids)),)
    shard = Shard(cp.layout, cp.world_size, cp.rank, ids.shape[1], None, contents, start=start)
    positions = shard.position_ids(ids.device)
    _call(cache, model, cp.shard(ids), positions, **{NAME: shard})


def _run_everywhere(cache: ShardedCache, model: PreTrainedModel, ids: Tensor) -> None:
    """Run a few tokens ``[B, n]``, the same on every rank."""
    cp, start = cache.sequences.cp, cache.get_seq_length()
    if not ids.shape[1]:
        return
    cp.agree(KIND, tokens=ids.shape[1], contents=digest(ids))
    _call(cache, model, ids, torch.arange(start, start + ids.shape[1], device=ids.device))


def _call(cache: ShardedCache, model: PreTrainedModel, ids: Tensor, positions: Tensor, **more: Any) -> None:
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = 1
    model(input_ids=ids, position_ids=positions.expand(len(ids), -1), past_key_values=cache, use_cache=True, **more)
    cache.require_attended()


@contextmanager
def _one_sequence(cache: ShardedCache, row: int) -> Iterator[None]:
    """Within it, forwards are of this sequence only."""
    cache.sequences.row = row
    try:
        yield
    finally:
        cache.sequences.row = None


def _padding(ids: Tensor, attention_mask: Tensor | None) -> tuple[int, ...]:
    if attention_mask is None:
        return (0,) * len(ids)
    return tuple(int(n) for n in (attention_mask != 0).long().argmax(1).tolist())


def _shape_problem(ids: object, attention_mask: object) -> str | None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        return f"ids: expected a tensor of integers [batch, tokens], as model.generate takes it, got {got}"
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        return f"attention_mask: expected a tensor {list(ids.shape)}, as ids"
    if not bool((attention_mask[:, 1:] >= attention_mask[:, :-1]).all() and (attention_mask[:, -1] == 1).all()):
        return "attention_mask: expected zeros on the left and ones behind them; pad with padding_side='left'"
    return None


def generate_problem(sequences: Sequences, had: int) -> str | None:
    """Check, once per ``generate``, that its tokens begin with the prefilled ones.

    had: the number of tokens in the cache, including padding.
    """
    frame = generating()
    ids = None if frame is None else frame.f_locals.get("input_ids")
    if ids is None or ids is sequences.generated or sequences.prompt is None:
        return None
    are_tokens = len(ids) == len(sequences.prompt) and ids.shape[1] >= had  # else embeddings were given, not tokens
    problem = _prefix_problem(sequences.prompt, ids, had) if are_tokens else None
    if problem is not None:
        return f"generate: was given other tokens than cache.prefill. {problem}"
    sequences.generated = ids
    return None


def _prefix_problem(prompt: Tensor | None, ids: Tensor, had: int) -> str | None:
    """Whether ``ids`` begin with what was prefilled before, as far as the cache still has it."""
    if prompt is None:
        return None
    known = min(had, prompt.shape[1])
    others = (prompt[:, :known].to(ids.device) != ids[:, :known]).nonzero()
    if not len(others):
        return None
    row, at = others[0].tolist()
    return (
        f"ids: token {at} of sequence {row} is {int(ids[row, at])}, where the cache has had {int(prompt[row, at])}; a "
        "later turn begins with what the cache has had. cache.reset() forgets it"
    )


def _problem(
    cache: ShardedCache, model: PreTrainedModel, ids: Tensor, chunk: int | None, padding: tuple[int, ...] | None
) -> str | None:
    sequences, (batch, tokens) = cache.sequences, ids.shape
    if chunk is not None and (as_int(chunk) is None or chunk < 1):
        return f"chunk: expected a number of tokens, at least 1, or None, got {chunk!r}"
    if sequences.batch not in (0, batch):
        return (
            f"ids: {batch} sequences, and the cache has {sequences.batch}; expected as many. "
            "cache.batch_select_indices(indices) keeps some of them, cache.reset() forgets them"
        )
    had = cache.get_seq_length()
    if had and padding != (sequences.padding or (0,) * batch):
        return f"attention_mask: prompts were padded by {sequences.padding} before, and now by {padding}"
    if had > tokens - 1:
        return (
            f"ids: {tokens} tokens, and the cache has had {had}; expected more, that begin with those. cache.crop(-n) "
            "forgets the last n, cache.reset() all"
        )
    if (problem := _prefix_problem(sequences.prompt, ids, had)) is not None:
        return problem
    attention = model.config._attn_implementation
    if attention not in NAMES:
        return f'attn_implementation: the model has {attention!r}; expected "{NAME}", after register(cp)'
    if padding and any(padding) and any(map(scales_queries, model.modules())):
        return (
            "attention_mask: this model scales queries by their position, padding included; padded prompts are not "
            "supported. Generate for one prompt at a time, or set config.attn_temperature_tuning = False"
        )
    return None
