"""torch's own context parallelism, for comparison: `train_transformers.py --attention torch`.

Shapes: B sequences, S tokens of a sequence, T of them on this rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AttentionInterface

import distflash as df
from distflash.integrations import transformers as dft


class TorchAttention:
    """`torch.distributed.tensor.experimental.context_parallel` with cuDNN.

    repeat_kv: expand keys and values to all query heads, for torch versions without GQA here.
    """

    name = "torch_context_parallel"

    def __init__(self, mesh: DeviceMesh, repeat_kv: bool) -> None:
        self.mesh = mesh
        # Transformers makes no mask for an unknown name; the attention is causal instead.
        AttentionInterface.register(self.name, partial(causal_sdpa, repeat_kv=repeat_kv))

    @contextmanager
    def sharded(self, batch: dict[str, Tensor], cp: df.ContextParallel) -> Iterator[dict[str, Any]]:
        """This rank's part of tokens and labels [B, S], as a trainer's inputs. Run backward within it, too."""
        from torch.distributed.tensor.experimental import context_parallel
        from torch.nn.attention import SDPBackend, sdpa_kernel

        tokens, labels = batch["input_ids"], batch["shift_labels"]
        part = dft.shard_batch(batch, cp)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        buffers = [tokens, labels, positions]
        with (
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
            context_parallel(self.mesh, buffers=buffers, buffer_seq_dims=[1] * 3, no_restore_buffers=set(buffers)),
        ):
            own = {"input_ids": tokens, "shift_labels": labels, "position_ids": positions, "attention_mask": None}
            yield {**part, **own}

    def keep(self) -> Any:
        """The `context_fn` of activation checkpointing that keeps attention's outputs."""

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            kept = op is torch.ops.aten._scaled_dot_product_cudnn_attention.default
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)


def causal_sdpa(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: None,
    *,
    repeat_kv: bool,
    scaling: float,
    distflash: dft.Shard,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of q [B, heads, T, D] over k and v [B, kv_heads, T, D], as [B, T, heads, D]."""
    distflash.trace.note(module)  # the trainer checks that attention ran over all ranks
    if repeat_kv:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # Looked up in the module, where context_parallel replaces it.
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2), None
