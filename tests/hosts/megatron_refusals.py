"""Errors of the Megatron integration, on a rank."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

import distflash as df
from distflash.integrations.megatron import PerDocument
from distflash.integrations.megatron.packed import packed_problem
from distflash.integrations.megatron.problems import call_problem, config_problem
from distflash.layouts import Layout
from distflash.transport import Alone

CONFIG = TransformerConfig(
    num_layers=1, hidden_size=16, num_attention_heads=2, attention_dropout=0.0, use_cpu_initialization=True
)
MATRIX = torch.zeros(4, 4)


def of_layers() -> dict[str, str | None]:
    cp = df.ContextParallel(Alone())
    wrong: dict[str, tuple[dict[str, Any], str, str | None, df.ContextParallel]] = {
        "nothing": ({}, "self", "p2p", cp),
        "ranks": ({"context_parallel_size": 2}, "self", None, cp),
        "layout": ({}, "self", None, df.ContextParallel(Alone(), df.Striped())),
        "cross": ({}, "cross", None, cp),
        "comm": ({}, "self", "a2a", cp),
        "logits": ({"log_max_attention_logit": True}, "self", None, cp),
    }
    return {
        name: config_problem(replace(CONFIG, **options), kind, comm, group)
        for name, (options, kind, comm, group) in wrong.items()
    }


def of_calls() -> dict[str, str | None]:
    q, causal, padding = torch.zeros(4, 1, 2, 8), AttnMaskType.causal, AttnMaskType.padding
    return {
        "nothing": call_problem(q, q, causal, None, None, None),
        "bias": call_problem(q, q, causal, None, MATRIX, None),
        "mask": call_problem(q, q, causal, MATRIX, None, None),
        "kind": call_problem(q, q, padding, None, None, None),
        "cache": call_problem(q[:1], q, causal, None, None, None),
    }


def of_packed() -> dict[str, str | None]:
    cu = torch.tensor([0, 8, 12], dtype=torch.int32)
    good = PackedSeqParams("thd", cu, cu)
    others = {
        "nothing": good,
        "format": replace(good, qkv_format="bshd"),
        "group": replace(good, local_cp_size=1),
        "keys": replace(good, cu_seqlens_kv=torch.tensor([0, 4, 12])),
        "lengths": PackedSeqParams("thd", *[torch.tensor([0, 6, 12])] * 2),
    }
    return {name: packed_problem(each, df.Documents(each.cu_seqlens_q), 2) for name, each in others.items()}


def layout_agrees(lengths: list[int], world_size: int) -> bool:
    """Whether all tokens are held once, and counts are those that the ranges give."""
    documents = df.Documents(torch.tensor([0, *lengths]).cumsum(0))
    layout, total = PerDocument(documents), sum(lengths)
    held = torch.cat([layout.positions(total, world_size, rank) for rank in range(world_size)])
    places = torch.arange(-2, total + 3)
    counts = (
        (
            layout.count_below(places, total, world_size, rank),
            Layout.count_below(layout, places, total, world_size, rank),
        )
        for rank in range(world_size)
    )
    return bool((held.sort().values == torch.arange(total)).all()) and all(torch.equal(a, b) for a, b in counts)
