"""The portable kernel: exact attention in Triton, on NVIDIA sm_80 and later, on AMD, and in Triton's interpreter.

Importable without triton, which is imported when the kernel is first used.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from distflash.kernels.base import Abilities, BackwardContext, Kernel, KeyGradient, Keys, Problem, QueryGradient, Scores
from distflash.kernels.launch import Launch, aligned
from distflash.kernels.machine import Machine, machine_of
from distflash.kernels.replay import Replays, facts_of, of_keys, of_state
from distflash.kernels.triton.tiles import Tiles
from distflash.kernels.versions import warn_untested
from distflash.partial import Partial
from distflash.plan import Gradients, Pass

if TYPE_CHECKING:
    from distflash.kernels.decoding import Decoding
    from distflash.kernels.triton.launches import Device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257, 8)

_forward, _statistics, _of_keys, _of_queries = Replays(), Replays(), Replays(), Replays()


@dataclass(frozen=True)
class Triton(Kernel):
    """Exact attention in Triton, by row and column intervals; see `distflash.kernels.base.Kernel`.

    Forward after FlashAttention-2 (https://arxiv.org/abs/2307.08691), merging into the running state of earlier passes.
    Backward is one kernel for dK and dV and one for dQ, and deterministic. float16 and bfloat16 products accumulate in
    float32, and P and dS are rounded to the input's dtype for the second products; float32 products are exact.

    Args:
        tiles: tile sizes in place of the shipped table's, for tuning.
        interpret: take tensors on the CPU, in Triton's interpreter: exact and slow, for tests. It must have been turned
            on (``TRITON_INTERPRET=1``) before triton was first imported.
        machine: see `Kernel.rehearsing`.

    Examples:
        >>> problem = df.kernels.Problem(torch.device("cpu"), torch.bfloat16, heads=8, kv_heads=2, d_qk=128, d_v=128)
        >>> df.kernels.Triton().not_supported_reasons(problem)
        ['Triton kernels run on GPUs, not on cpu']
    """

    base: ClassVar[float] = 2.0

    tiles: Tiles | None = None
    interpret: bool = False
    machine: Machine | None = field(default=None, repr=False)

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = _interpreter_reasons() if self.interpret else _device_reasons(problem.device, self.machine)
        if problem.dtype not in DTYPES:
            reasons.append(f"the Triton kernel takes float32, float16 and bfloat16, not {problem.dtype}")
        for name, dim in (("d_qk", problem.d_qk), ("d_v", problem.d_v)):
            if dim not in HEAD_DIMS:
                reasons.append(f"the Triton kernel takes head dims of 16 to 256 in steps of 8, not {name} = {dim}")
        if not reasons:
            import triton

            warn_untested(triton.__version__)
        return reasons

    def abilities(self, device: torch.device) -> Abilities:
        return Abilities(separate_gradients=True)

    def rehearsing(self, machine: Machine) -> Triton | None:
        if self.interpret or _interpreted():
            return None
        from distflash.kernels.triton import launches  # noqa: F401  for processes that are forked from this one

        return replace(self, machine=machine)

    def decoding(self, device: torch.device) -> Decoding:
        from distflash.kernels.triton.decoding_launches import TritonDecoding

        return TritonDecoding(interpret=self.interpret)

    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        (of_source,) = keys
        rows = of_source.rows
        groups = None if each.live is None else each.live.groups
        positions = rows.q_positions, rows.k_positions
        seed = None if scores.dropout is None else scores.dropout.seed
        tensors = [q, *of_keys(keys), *positions, scores.sinks, scores.alibi_slopes, seed, *of_state(into), groups]
        inputs = facts_of(q, of_source.k, of_source.v, scores.sinks)
        facts = self.identity, each.facts, scores.facts, rows.in_tiles, inputs, into.maxima is None

        def build() -> Launch:
            from distflash.kernels.triton import launches

            return launches.forward(self._device(q, of_source.v, scores), q, of_source, each, scores, into)

        _forward.run(facts, tensors, build)

    def preprocess(
        self,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        dq_accum: Tensor | None = None,
        counter: Tensor | None = None,
    ) -> BackwardContext:
        """As `Kernel.preprocess`; ``dq_accum, counter``: of the context, where other kernels' passes follow."""
        saved = saved_of(q, out, lse, dout, dq_accum, counter)
        out = aligned(out, True)

        def build() -> Launch:
            from distflash.kernels.triton import launches

            return launches.statistics(saved, out, dlse)

        _statistics.run(facts_of(out, saved.dout, dlse), [out, saved.dout, saved.lse, dlse, saved.lse_delta], build)
        return saved

    def backward(
        self, saved: BackwardContext, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        rows = keys.rows
        ends = rows.row_lo, rows.row_hi, rows.col_lo, rows.col_hi, rows.q_positions, rows.k_positions
        seed = None if scores.dropout is None else scores.dropout.seed
        shared = [saved.q, saved.dout, saved.lse_delta, keys.k, keys.v, *ends, scores.alibi_slopes, seed]
        inputs = facts_of(saved.q, saved.dout, keys.k, keys.v)
        facts = self.identity, each.facts, scores.facts, rows.in_tiles, inputs
        if each.gradients is not Gradients.OF_QUERIES:
            tensors = [*shared, dkv.dk, dkv.dv]
            _of_keys.run((facts, facts_of(dkv.dk)), tensors, lambda: self._backward_keys(saved, keys, scores, dkv))
        if each.gradients is not Gradients.OF_KEYS:
            tensors = [*shared, dq.final, dq.sum]
            _of_queries.run(
                (facts, facts_of(dq.final)), tensors, lambda: self._backward_queries(saved, keys, each, scores, dq)
            )

    def _backward_keys(self, saved: BackwardContext, keys: Keys, scores: Scores, dkv: KeyGradient) -> Launch:
        from distflash.kernels.triton import launches

        return launches.backward_keys(self._device(saved.q, keys.v, scores), saved, keys, scores, dkv)

    def _backward_queries(
        self, saved: BackwardContext, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient
    ) -> Launch:
        from distflash.kernels.triton import launches

        return launches.backward_queries(self._device(saved.q, keys.v, scores), saved, keys, each, scores, dq)

    def _device(self, q: Tensor, v: Tensor, scores: Scores) -> Device:
        from distflash.kernels.triton import launches

        name = family(q.device) if self.machine is None else self.machine.family
        has_dropout = scores.dropout is not None
        return launches.device(name, q.element_size(), max(q.shape[-1], v.shape[-1]), self.tiles, has_dropout)


def saved_of(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dq_accum: Tensor | None = None,
    counter: Tensor | None = None,
) -> BackwardContext:
    """What the passes of a backward share, with room for its statistics.

    These are float32 ``[2, B * H, T']``, lse in base 2 and delta. T' is T rounded up to 16 bytes; what lies beyond T is
    not read.
    """
    B, T, H, _ = out.shape
    # Copied here, if at all, and not once more in every pass.
    q, dout, lse = aligned(q, True), aligned(dout, True), lse.contiguous()
    stats = lse.new_empty(2, B * H, -(-T // 4) * 4)
    return BackwardContext(q, dout, lse, lse_delta=stats, counter=counter, dq_accum=dq_accum)


@functools.cache
def family(device: torch.device) -> str:
    """The device's row in the table of tiles."""
    if _interpreted():
        return "interpreter"
    return machine_of(device).family


def _device_reasons(device: torch.device, machine: Machine | None) -> list[str]:
    reasons = _package_reasons()
    if machine is None and device.type != "cuda":
        return [*reasons, f"Triton kernels run on GPUs, not on {device.type}"]
    arch = (machine or machine_of(device)).arch
    if isinstance(arch, int) and arch < 80:
        reasons.append("the Triton kernel needs an NVIDIA GPU of compute capability 8.0 or later")
    return reasons


def _interpreter_reasons() -> list[str]:
    reasons = _package_reasons()
    if not reasons and not _interpreted():
        reasons.append("Triton's interpreter is off: set TRITON_INTERPRET=1 before triton is imported")
    return reasons


def _package_reasons() -> list[str]:
    found = importlib.util.find_spec("triton") is not None
    return [] if found else ["the Triton kernel needs the package triton, which is not installed"]


@functools.cache
def _interpreted() -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    from distflash.kernels.triton.forward import forward_kernel

    return isinstance(forward_kernel, InterpretedFunction)
