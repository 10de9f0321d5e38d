"""The portable kernel: exact attention in Triton, on NVIDIA sm_80 and later, on AMD, and in Triton's interpreter.

Importable without triton, which is imported when the kernel is first asked for something.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from distflash.kernels.base import Abilities, Kernel, KeyGradient, Keys, Problem, QueryGradient, Saved, Scores
from distflash.kernels.triton.tiles import Tiles
from distflash.partial import Partial
from distflash.plan import Gradients, Pass

if TYPE_CHECKING:
    from distflash.kernels.decoding import Decoding
    from distflash.kernels.triton.launches import Device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257, 8)


@dataclass(frozen=True)
class Triton(Kernel):
    """Exact attention in Triton, by row and column intervals; see `distflash.kernels.base.Kernel`.

    Forward after FlashAttention-2 (https://arxiv.org/abs/2307.08691), merging into the partial of earlier hops;
    backward as one kernel for dK and dV and one for dQ, deterministic. float16 and bfloat16 products accumulate in
    float32, and P and dS are rounded to the input's dtype for the second products; float32 products are exact.

    Args:
        tiles: tile sizes in place of the shipped table's, for tuning.
        interpret: take tensors on the CPU, in Triton's interpreter: exact and slow, for tests. It must have been turned
            on (``TRITON_INTERPRET=1``) before triton was first imported.
    """

    base: ClassVar[float] = 2.0

    tiles: Tiles | None = None
    interpret: bool = False

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = _interpreter_reasons() if self.interpret else _device_reasons(problem.device)
        if problem.dtype not in DTYPES:
            reasons.append(f"the Triton kernel takes float32, float16 and bfloat16, not {problem.dtype}")
        for name, dim in (("d_qk", problem.d_qk), ("d_v", problem.d_v)):
            if dim not in HEAD_DIMS:
                reasons.append(f"the Triton kernel takes head dims of 16 to 256 in steps of 8, not {name} = {dim}")
        if problem.dropout_p:
            reasons.append("the Triton kernel has no dropout")
        return reasons

    def abilities(self, device: torch.device) -> Abilities:
        return Abilities(separate_gradients=True)

    def decoding(self, device: torch.device) -> Decoding:
        from distflash.kernels.triton.decoding_launches import TritonDecoding

        return TritonDecoding(interpret=self.interpret)

    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        from distflash.kernels.triton import launches

        (of_source,) = keys
        with _on(q.device):
            launches.forward(self._device(q, of_source.v), q, of_source, each, scores, into).run()

    def save(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Saved:
        from distflash.kernels.triton import launches

        with _on(q.device):
            launch, saved = launches.save(q, out, lse, dout, dlse)
            launch.run()
        return saved

    def backward(
        self, saved: Saved, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        from distflash.kernels.triton import launches

        device = self._device(saved.q, keys.v)
        with _on(saved.q.device):
            if each.gradients is not Gradients.OF_QUERIES:
                launches.backward_keys(device, saved, keys, scores, dkv).run()
            if each.gradients is not Gradients.OF_KEYS:
                launches.backward_queries(device, saved, keys, each, scores, dq).run()

    def _device(self, q: Tensor, v: Tensor) -> Device:
        from distflash.kernels.triton import launches

        name = family(q.device)
        return launches.device(name, q.element_size(), max(q.shape[-1], v.shape[-1]), self.tiles)


@functools.cache
def family(device: torch.device) -> str:
    """The device's row in the table of tiles."""
    if _interpreted():
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def _device_reasons(device: torch.device) -> list[str]:
    reasons = _package_reasons()
    if device.type != "cuda":
        reasons.append(f"the Triton kernel runs on GPUs, not on {device.type}")
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
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


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current GPU, whichever holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
