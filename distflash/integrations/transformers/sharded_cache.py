"""`ShardedCache`: a Transformers cache for generation over a group of ranks.

[Note: shapes] B batch, S tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from distflash.context import ContextParallel
from distflash.integers import as_int
from distflash.integrations.transformers import prefilling
from distflash.integrations.transformers.cached_layer import CachedLayer, Sequences
from distflash.integrations.transformers.one_rank import follow_random_state


class ShardedCache(Cache):
    """KV cache of a model's layers, sharded over the ranks of ``cp``, for ``model.generate``.

        cache = ShardedCache(cp)
        cache.prefill(model, ids)                                # all but the last token, sharded over the ranks
        out = model.generate(ids, past_key_values=cache)         # every rank has the same tokens

    Every rank calls both, with the same whole ``ids``. In a later turn, ``ids`` begin with the tokens in the cache.
    Left-padded prompts need their attention_mask in both calls. The model has ``attn_implementation="distflash"``.

    Sampling is rank 0's: the other ranks get its logits and random state with every step.

    Args:
        cp: the group that `register` was given.
        capacity: the most tokens of a sequence; memory is allocated at once. None: memory grows with the sequences.
            Layers with a window never store more than the window.

    Raises:
        ValueError: an argument has the wrong type.
    """

    def __init__(self, cp: ContextParallel, capacity: int | None = None) -> None:
        if not isinstance(cp, ContextParallel):
            raise ValueError(f"cp: expected the ContextParallel that register was given, got {type(cp).__name__}")
        if capacity is not None and (as_int(capacity) is None or capacity < 1):
            raise ValueError(f"capacity: expected a number of tokens, at least 1, or None, got {capacity!r}")
        self.sequences = Sequences(cp, capacity)
        super().__init__(layer_class_to_replicate=partial(CachedLayer, self.sequences))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"ShardedCache({self.sequences.cp!r}, layers={len(self.layers)}, lengths={self.lengths})"

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each sequence, without padding."""
        return self.layers[0].lengths if self.layers else (0,) * self.sequences.batch

    @property
    def nbytes(self) -> int:
        """Device memory on this rank."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.cache is not None)

    @property
    def batch_size(self) -> int:
        """The number of sequences; -1 before the first forward."""
        return self.sequences.batch or -1

    @torch.no_grad()
    def prefill(
        self, model: PreTrainedModel, ids: Tensor, chunk: int | None = None, attention_mask: Tensor | None = None
    ) -> None:
        """Run the model on the tokens of ``ids`` that are not in the cache, sharded over the ranks.

        The last token is left for ``model.generate(ids, past_key_values=cache)``, so that all ranks get its logits.
        Prompts of unequal length are run one by one.

        Args:
            ids: int64 ``[B, S]``, the whole prompt, the same on every rank. It begins with the tokens in the cache.
            chunk: tokens per forward, over all ranks; None for all. Smaller chunks need less memory for activations,
                and more time.
            attention_mask: ``[B, S]``, zeros for padding on the left.

        Raises:
            ValueError: on every rank, if an argument is invalid, or if ranks have different tokens.
        """
        prefilling.prefill(self, model, ids, chunk, attention_mask)
        follow_random_state(self.sequences.cp)

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by a layer with its new keys and values. If a prompt is repeated n times, so is its cache."""
        if self.sequences.row is None:
            self.require_batch(key_states.shape[0])
        new = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._require_in_step(layer_idx, self.layers[layer_idx].lengths)
        return new

    def require_batch(self, batch: int) -> None:
        """Repeat sequences up to ``batch``, as ``generate`` does for beams and several results."""
        had = self.sequences.batch
        if had == batch:
            return
        if not had:
            self.sequences.batch = batch
        elif batch % had == 0:
            self.batch_repeat_interleave(batch // had)
        else:
            self.sequences.cp.refuse(
                f"input_ids: {batch} sequences, and the ShardedCache has {had}; expected as many, or a multiple. "
                "cache.batch_select_indices(indices) keeps some of them, cache.reset() forgets them",
                in_attention=True,
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of the first sequence, including padding."""
        if layer_idx < len(self.layers):
            return super().get_seq_length(layer_idx)
        return self.sequences.padding[0] if self.sequences.padding and self.sequences.row is None else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Sizes of the mask matrix, which is never materialised."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence n by sequence ``beam_idx[n]``, for beam search."""
        indices = beam_idx.tolist()
        super().reorder_cache(indices)
        self._take(indices)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Select sequences, with repetition, in this order."""
        if isinstance(indices, Tensor):
            indices = (indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist()
        super().batch_select_indices(indices)
        self.sequences.batch = len(indices)
        self._take(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, for example rejected drafts. tokens_to_remove: their number, negated."""
        super().crop(tokens_to_remove)
        if self.sequences.prompt is not None and tokens_to_remove:
            self.sequences.prompt = self.sequences.prompt[:, : self.get_seq_length()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, as `torch.repeat_interleave`."""
        self.batch_select_indices([n for n in range(self.sequences.batch) for _ in range(repeats)])

    def reset(self) -> None:
        """Drop all tokens, and free the memory."""
        super().reset()
        self.sequences.batch, self.sequences.padding, self.sequences.expected = 0, (), 0
        self.sequences.prompt = None
        self.layers.clear()

    def require_attended(self) -> None:
        """Raise if a layer's attention was not distflash's."""
        for layer in self.layers:
            layer.require_attended()

    def forget_unfinished(self) -> None:
        """Drop tokens that a failed forward has left in the first layers. No forward may be running."""
        caches = [layer.cache for layer in self.layers if layer.cache is not None]
        lengths = [cache.lengths for cache in caches]
        if len(set(lengths)) > 1:
            finished = list(map(min, zip(*lengths, strict=True)))
            for cache in caches:
                cache.truncate(finished)
        for layer in self.layers:
            layer.awaits_attention = False

    def _require_in_step(self, layer_idx: int, lengths: tuple[int, ...]) -> None:
        """Raise if a layer's lengths differ from the first layer's before this forward."""
        sequences = self.sequences
        if sequences.first is None or layer_idx <= sequences.first:
            sequences.first, sequences.starts, sequences.checked = layer_idx, lengths, False
        elif lengths != sequences.starts:
            sequences.cp.refuse(
                f"past_key_values: layer {layer_idx} has had {lengths} tokens of the sequences, the first layer "
                f"{sequences.starts}: a forward has raised before it got there. Call cache.reset(), and prefill again",
                in_attention=True,
            )

    def _take(self, indices: Sequence[int]) -> None:
        """Select padding and prompts like the sequences."""
        sequences = self.sequences
        if sequences.padding:
            sequences.padding = tuple(sequences.padding[n] for n in indices)
        if sequences.prompt is not None:
            sequences.prompt = sequences.prompt[list(indices)]
