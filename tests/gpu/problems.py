"""Problems for GPU tests: every feature once, with lengths that are not multiples of a tile."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

import distflash as df
from tests.dense import Inputs, Problem, Results

_BASE = Problem(seq_len=517, batch=2, heads=4, kv_heads=2, d_qk=64, d_v=64)
_DOCUMENTS = df.Documents([0, 3, 130, 131, 400, 517])

PROBLEMS: dict[str, Problem] = {
    "causal": _BASE,
    "full": replace(_BASE, mask=df.Full()),
    "window": replace(_BASE, mask=df.Window(100, 0)),
    "window both ways": replace(_BASE, mask=df.Window(60, 45)),
    "documents": replace(_BASE, mask=df.Causal() & _DOCUMENTS),
    "prefix": replace(_BASE, mask=df.PrefixLM(150)),
    "chunked": replace(_BASE, mask=df.Chunked(96)),
    "window and first keys": replace(_BASE, mask=df.Causal() & (df.Window(100, 0) | df.FirstTokens(5)), sinks=True),
    "tree": replace(_BASE, mask=df.Tree([-1, 0, 0, 2, 2, -1], [200, 50, 67, 60, 40, 100]), softcap=3.0),
    "multi-query, head dim 80": replace(_BASE, heads=3, kv_heads=1, d_qk=80, d_v=80),
    "head dims 192 and 128": replace(_BASE, d_qk=192, d_v=128),
    "head dim 256": replace(_BASE, d_qk=256, d_v=256),
    "softcap": replace(_BASE, softcap=2.0),
    "alibi": replace(_BASE, alibi=True),
    "sinks": replace(_BASE, sinks=True),
    "everything": replace(_BASE, mask=df.Causal() & _DOCUMENTS, softcap=5.0, alibi=True, sinks=True, scale=0.3),
}

# Relative errors that rounding of the inputs' size explains; a wrong mask or a lost hop is off by 0.1 and more.
BARS = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def on(x: Inputs, device: torch.device | str) -> Inputs:
    values = {f.name: getattr(x, f.name) for f in fields(x)}
    return Inputs(**{name: None if t is None else t.to(device) for name, t in values.items()})


def to_cpu(results: Results) -> Results:
    return {name: t.cpu() for name, t in results.items()}
