"""Tiny GPT models of Megatron-Core on CPUs: with its own attention on one process, or over ranks with distflash."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import megatron.core.fusions.fused_softmax as softmax
import megatron.core.models.common.embeddings.rotary_pos_embedding as rotary
import megatron.core.tensor_parallel.random as recomputation
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

import distflash as df
from distflash.integrations.megatron import PerDocument, core_attention
from tests.hosts.runs import MegatronRun as Run

VOCABULARY = 64


# Small things in the places of what only GPUs have.
softmax.get_default_causal_mask = lambda tokens: ~torch.ones(tokens, tokens, dtype=torch.bool).tril()
softmax.get_sliding_window_causal_mask = lambda queries, keys, window: (
    ~torch.ones(queries, keys, dtype=torch.bool).triu(-window[0]).tril(window[1])
)
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
tensor_parallel.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)
# Megatron's recomputation sets back the state of the CPU's generator, which is all that is drawn from here.
recomputation._get_cuda_rng_state = lambda **_: None
recomputation._set_cuda_rng_state = lambda *_, **__: None


def _positions_of_rank(pos_emb: Tensor, seq_dim: int, cp_group: Any) -> Tensor:
    """As Megatron's, without pinned memory."""
    chunks = pos_emb.chunk(2 * cp_group.size(), dim=seq_dim)
    return torch.cat([chunks[cp_group.rank()], chunks[-1 - cp_group.rank()]], dim=seq_dim)


rotary.get_pos_emb_on_this_cp_rank = _positions_of_rank


def model_of(run: Run, distributed: bool) -> tuple[Any, df.ContextParallel | None]:
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(context_parallel_size=run.context)
    torch.manual_seed(0)
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "context_parallel_size": run.context,
        "gradient_accumulation_fusion": False,
        **dict(run.options),
    }
    config = TransformerConfig(**settings)
    spec = get_gpt_layer_local_spec()
    cp = None
    if distributed:
        cp = df.ContextParallel(parallel_state.get_context_parallel_group())
        spec.submodules.self_attention.submodules.core_attention = core_attention(cp)
    model = GPTModel(config, spec, VOCABULARY, 64, position_embedding_type="rope")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (p.dim() == 1))
    return model, cp


def batch_of(step: int, run: Run) -> dict[str, Tensor]:
    batch, seq_len = (1, sum(run.documents)) if run.documents else (2, 32)
    tokens = torch.randint(0, VOCABULARY, (batch, seq_len + 1), generator=torch.Generator().manual_seed(step))
    positions = torch.arange(seq_len).expand(batch, -1)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}


def losses(model: Any, batch: dict[str, Tensor], packed: Any = None) -> Tensor:
    """Summed over the batch's tokens."""
    given = (batch["tokens"], batch["position_ids"], None)
    return model(*given, labels=batch["labels"], packed_seq_params=packed).sum()


def loss_alone(model: Any, batch: dict[str, Tensor], run: Run) -> Tensor:
    """By Megatron alone, documents one after the other: its own attention takes none that are packed."""
    if not run.documents:
        return losses(model, batch)
    parts = zip(*(x.split(run.documents, dim=1) for x in batch.values()), strict=True)
    return sum(losses(model, dict(zip(batch, part, strict=True))) for part in parts)


def loss_on_rank(model: Any, batch: dict[str, Tensor], run: Run, cp: df.ContextParallel) -> Tensor:
    if not run.documents:
        mine = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
        return losses(model, mine)
    boundaries = torch.tensor([0, *run.documents]).cumsum(0).to(torch.int32)
    layout = PerDocument(df.Documents(boundaries))
    places = layout.positions(sum(run.documents), cp.world_size, cp.rank)
    packed = PackedSeqParams(
        "thd", boundaries, boundaries, max_seqlen_q=max(run.documents), max_seqlen_kv=max(run.documents)
    )
    return losses(model, {name: x[:, places] for name, x in batch.items()}, packed)


def train(run: Run, distributed: bool) -> dict[str, list[float]]:
    """Runs as a rank: losses and norms of the gradient."""
    model, cp = model_of(run, distributed)
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for step in range(run.steps):
        batch = batch_of(step, run)
        count = batch["labels"].numel()
        loss = (loss_alone(model, batch, run) if cp is None else loss_on_rank(model, batch, run, cp)) / count
        model.zero_grad()
        loss.backward()
        loss = loss.detach()
        for x in (loss, *(p.grad for p in model.parameters() if p.grad is not None)):
            dist.all_reduce(x)
        found["loss"].append(loss.item())
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        found["grad_norm"].append(torch.stack(norms).norm().item())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return found


class Tracker:
    """A random state of its own, as Megatron's tracker has one for each tensor-parallel rank."""

    def __init__(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state)
        yield
        self.state = torch.get_rng_state()
        torch.set_rng_state(outside)


def seeds() -> dict[str, Any]:
    """Of dropout: on two tensor-parallel ranks, once more on the first, and where there is nothing to fork."""
    model, _ = model_of(Run(options=(("attention_dropout", 0.5),)), True)
    layer = model.decoder.layers[0].self_attention.core_attention

    def drawn(tracker: Any) -> list[int]:
        with mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker):
            return [int(layer.dropout_seed(torch.device("cpu"))) for _ in range(2)]

    found: dict[str, Any] = {name: drawn(Tracker(int(name[0]))) for name in ("0", "1", "0 again")}
    layer.eval()
    with mock.patch.object(type(layer), "dropout_seed", side_effect=AssertionError):
        layer(*torch.randn(3, 8, 1, 4, 8))
    layer.config = copy.copy(layer.config)
    layer.config.sequence_parallel = True
    torch.manual_seed(5)
    as_it_is = [int(torch.randint(2**62, ())) for _ in range(2)]
    torch.manual_seed(5)
    return found | {"already forked": drawn(None) == as_it_is}
