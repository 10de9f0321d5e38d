"""Compilation of kernels before the first call that needs them (`ContextParallel.warm_up`), in parallel processes.

A rehearsal runs a call, forward and backward, on meta tensors and over a transport that sends nothing. So it makes the
launches of the real call, for any plan, placements and kernel.

Calls of one kind, which differ only in lengths (such as the documents of a batch; without dropout), are compiled once.
A specialisation that only a later call of the kind needs is compiled when it is first launched.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import torch

from distflash import attend, lengths, validation
from distflash.agreement import Agreement
from distflash.call import Calls
from distflash.dropout import in_steps, threshold_of
from distflash.exact import ByValue
from distflash.geometry import Sharded
from distflash.given import Given, Options
from distflash.kernels import Kernel, Problem
from distflash.kernels.machine import Machine, machine_of
from distflash.layouts import Layout
from distflash.mask_algebra import Mask
from distflash.specification import CallTokens, Specification
from distflash.transport import Alone, Silent

_LOG = logging.getLogger("distflash")
_META = torch.device("meta")
# After the first time, in seconds, a line is logged; after the second, waiting ends.
_SILENT_SECONDS, _PATIENCE = 2.0, 120.0
# The most processes: each runs the whole call, and there are about as many specialisations.
_PROCESSES = 8


@dataclass(frozen=True)
class Rehearsal:
    """A call of one rank without data.

    Attributes:
        calls: of the group. Nothing is sent through its transport.
        kernel: from `Kernel.rehearsing`.
        specification: of the call.
    """

    calls: Calls
    kernel: Kernel
    specification: Specification

    def __call__(self) -> None:
        real, specification = self.calls, self.specification
        W, rank = real.transport.world_size, real.transport.rank
        nobody = Silent(rank, W, _META, intra_node=real.transport.intra_node) if W > 1 else Alone(device=_META)
        calls = Calls(nobody, real.layout, real.schedule, self.kernel, Agreement(Alone(), every_call=False))
        problem, tokens, H = specification.problem, specification.tokens, specification.problem.heads
        layout = tokens.layout or real.layout
        T = Sharded(layout, tokens.q_len, W, tokens.q_start).length(rank)
        K = Sharded(tokens.kv_layout or layout, tokens.seq_len, W).length(rank)
        q, k, v, dout = (
            torch.empty(specification.batch, *sizes, dtype=problem.dtype, device=_META)
            for sizes in (
                (T, H, problem.d_qk),
                (K, problem.kv_heads, problem.d_qk),
                (K, problem.kv_heads, problem.d_v),
                (T, H, problem.d_v),
            )
        )
        given = Given(
            _lengths(specification),
            _of_heads(H, problem.sinks),
            _of_heads(H, problem.alibi),
            torch.empty((), dtype=torch.int64, device=_META) if problem.dropout_p else None,
        )
        layouts = tokens.kv_layout, tokens.layout
        options = Options(specification.scale, problem.softcap, problem.dropout_p, *layouts, problem.max_logits)
        recipe = calls.recipe_of_new(specification.mask.value, options)
        attention, _ = recipe.prepared(q, k, v, given, specification.needs_grad).forward_call(given)
        out, lse, _ = attend.forward(q, k, v, attention)
        if specification.needs_grad:
            for dlse in (None, torch.empty_like(lse)):  # without and with a gradient of lse
                attend.backward(dout, dlse, q, k, v, out, lse, attention)


def _lengths(specification: Specification) -> tuple[int, int, int]:
    """The lengths as the caller passed them, for `Given`."""
    tokens = specification.tokens
    whole = tokens.q_start == 0 and tokens.q_len == tokens.seq_len and tokens.kv_layout is None
    return tokens.seq_len, tokens.q_start, -1 if whole else tokens.q_len


def _of_heads(heads: int, there: bool) -> torch.Tensor | None:
    return torch.empty(heads, dtype=torch.float32, device=_META) if there else None


@dataclass(frozen=True)
class Shapes:
    """q ``[B, T, H, D]``, k ``[B, K, G, D]`` and v ``[B, K, G, V]`` of one rank."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]


def specification_of(
    calls: Calls,
    shapes: Shapes,
    dtype: torch.dtype,
    mask: Mask,
    seq_len: int | None,
    needs_grad: bool,
    layout: Layout | None = None,
    dropout_p: float = 0.0,
    max_logits: bool = False,
) -> Specification:
    """The specification of self-attention on the group's device, without softcap, sinks and slopes.

    layout: of this batch, if it is not the group's. dropout_p, max_logits: as in `attention`.

    Raises:
        ValueError: the shapes are not those of such a call.
    """
    q, k, v = (torch.empty(shape, dtype=dtype, device=_META) for shape in (shapes.q, shapes.k, shapes.v))
    problem = validation.call_problem(q, k, v, mask, None, None, None, 0.0, dropout_p, True, 0)
    if problem is None:
        transport = calls.transport
        length = lengths.seq_len_of(k.shape, mask, transport.world_size) if seq_len is None else seq_len
        problem = lengths.length_problem(
            "q", q.shape, mask, length, layout or calls.layout, transport.world_size, transport.rank
        )
    if problem is not None:
        raise ValueError(problem)
    dims = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    rate = in_steps(validation.as_number(dropout_p) or 0.0)
    asked = Problem(transport.device, dtype, *dims, dropout_p=rate, max_logits=max_logits)
    return Specification(
        asked, q.shape[0], CallTokens(length, 0, length, layout=layout), ByValue(mask), None, needs_grad
    )


def prepare_for(device: torch.device) -> None:
    """Begin what the first call on a GPU needs, whatever its arguments are. Imports triton; the rest is in a thread."""
    if device.type == "cuda":
        with suppress(ImportError):  # without triton
            from distflash.kernels.triton import compiling

            compiling.read_compiler_early()


def compile_for(calls: Calls, specification: Specification, kernel: Kernel) -> None:
    """Compile the kernels of a call on a GPU, unless that was done for calls of its kind, here or in another process.

    If it fails, it returns as well: the kernels are then compiled when they are first launched.
    """
    device = specification.problem.device
    if device.type != "cuda" or not specification.batch:
        return
    machine = machine_of(device)
    rehearsed = kernel.rehearsing(machine)
    if rehearsed is None:
        return
    try:
        errors = compile_all(Rehearsal(calls, rehearsed, specification), machine)
    except OSError as error:
        errors = (str(error),)
    if errors:
        _LOG.warning("kernels are compiled when they are first launched, and not before: %s", "; ".join(errors))


def compile_all(work: Rehearsal, machine: Machine) -> tuple[str, ...]:
    """Compile what ``work`` launches in parallel processes, unless a file beside triton's cache says that it is done.

    Returns:
        The errors of processes that failed, if any.

    Raises:
        OSError: no process can be started.
    """
    from distflash.kernels.triton import compiling  # here, since it imports triton

    folder, kind = compiling.cache_folder(), kind_of(work.calls, work.specification, work.kernel)
    name = hashlib.sha256(repr((kind, machine, compiling.VERSION, _sources())).encode()).hexdigest()
    mark = folder / "distflash" / f"{name}.done"
    if mark.exists():
        return ()
    began = time.monotonic()
    workers = compiling.Workers(work, machine, min(_PROCESSES, len(os.sched_getaffinity(0))))
    try:
        if not workers.wait(_SILENT_SECONDS):
            _LOG.warning("compiling attention kernels for %s; the result is kept in %s", machine, folder)
            workers.wait(_PATIENCE)
    finally:
        outcome = workers.finish()
    if not outcome.errors:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    _LOG.info("%d specialisations in %.1f s", len(outcome.compiled), time.monotonic() - began)
    return outcome.errors


def kind_of(calls: Calls, specification: Specification, kernel: Kernel) -> str:
    """A key that calls share if they launch the same specialisations, as far as can be told without planning them."""
    transport, tokens = calls.transport, specification.tokens
    asked, lengths = specification.problem, (tokens.seq_len, tokens.q_len, tokens.q_start)
    likeness: Hashable = tuple((n.bit_length(), n % 16) for n in lengths)
    if threshold := threshold_of(asked.dropout_p):
        # Triton specialises integers in a tuple, the threshold among them. And whether positions are consecutive
        # within tiles (`Intervals.in_tiles`) depends on the lengths.
        likeness = lengths, threshold == 1, threshold % 16 == 0
    softcap, dropout_p = float(asked.softcap > 0), float(threshold > 0)
    problem: Problem = replace(asked, device=_META, softcap=softcap, dropout_p=dropout_p)
    group = (
        transport.rank,
        transport.world_size,
        transport.intra_node,
        calls.layout,
        calls.schedule,
        tokens.kv_layout,
        type(tokens.layout),
    )
    mask = _names(specification.mask.value)
    return repr((problem, specification.batch, specification.needs_grad, likeness, group, mask, kernel))


def _names(mask: Mask) -> str:
    """The classes of a mask and its parts, without data."""
    parts: list[object] = [getattr(mask, f.name) for f in fields(mask)] if is_dataclass(mask) else []
    return f"{type(mask).__name__}({', '.join(_names(part) for part in parts if isinstance(part, Mask))})"


@functools.cache
def _sources() -> bytes:
    """A digest of the package's source, on which compiled kernels depend."""
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()
