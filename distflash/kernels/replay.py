"""Replayed launches: built and compiled once, then repeated with other tensor addresses.

Building a launch (descriptors, tile sizes, strides) and Triton's inspection of every argument cost the host ten times
as much as the launch itself. Layers and steps repeat the same launch with other tensors, so both are done once.

A replay is correct only if the launch depends on nothing but its key and the addresses. Callers put into the key the
shapes, strides and dtypes of the user's tensors (`facts_of`) and every number that the launch is built from. Buffers
that the package allocates are determined by these.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from distflash.dropout import Dropout
from distflash.kernels.base import Keys
from distflash.kernels.launch import Launch
from distflash.kernels.packed import Packed
from distflash.partial import Partial

# Triton specialises kernels for addresses that are multiples of this many bytes.
_ALIGNMENT = 16
# Launches kept: a bound for jobs with other lengths in every step. A replay holds no tensor.
_REMEMBERED = 1024
_UNKNOWN: Any = object()

# From an address to an argument.
Form = Callable[[int], Any]


class Replays:
    """The launches of one kernel, by their keys."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Replay | Packed | None] = {}

    def run(self, key: Hashable, tensors: Sequence[Tensor | None], build: Callable[[], Launch]) -> None:
        """Launch what ``build`` makes of these tensors, on the current stream of the first one's device.

        Args:
            key: everything that the launch depends on, except the addresses of ``tensors`` and which of them are None.
            tensors: all tensors whose addresses are arguments of the launch. The first is not None.
            build: makes the launch; called if no launch with this key can be replayed.
        """
        first = tensors[0]
        assert first is not None
        if first.is_cuda and first.get_device() != torch.cuda.current_device():  # Triton launches on the current one
            with torch.cuda.device(first.device):
                self.run(key, tensors, build)
            return
        if first.is_meta:  # no addresses: nothing is launched, see `warming`
            build().run()
            return
        addresses, offsets = [], []  # one loop: each comprehension would be a call
        for x in tensors:
            address = 0 if x is None else x.data_ptr()
            addresses.append(address)
            offsets.append(address % _ALIGNMENT if address else None)
        key = key, tuple(offsets)
        replay = self._known.get(key, _UNKNOWN)
        if replay is _UNKNOWN:
            launch = build()
            launch.run()
            self._remember(key, launch, addresses)
        elif replay is None:
            build().run()
        else:
            replay.run(addresses)

    def _remember(self, key: Hashable, launch: Launch, addresses: Sequence[int]) -> None:
        known = [address for address in addresses if address]
        if len(set(known)) < len(known):  # two tensors share an address, so arguments are ambiguous
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # recording would disturb it
            return
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[key] = _Replay.of(launch, addresses)


class _Replay:
    """A compiled kernel, its grid, and its arguments without addresses.

    Args:
        launch: the compiled kernel with its grid; takes the arguments in the kernel's order. None to launch nothing.
        arguments: in the kernel's order.
        slots: for each argument that has an address: its index, the tensor's index, and how to make it of an address.
    """

    def __init__(
        self, launch: Callable[..., None] | None, arguments: Sequence[Any], slots: Sequence[tuple[int, int, Form]]
    ) -> None:
        self.launch, self.arguments, self.slots = launch, list(arguments), tuple(slots)

    @staticmethod
    def of(launch: Launch, addresses: Sequence[int]) -> _Replay | Packed | None:
        """None if an argument does not start at the first element of a tensor: it was copied for this launch."""
        if not launch.is_compiled:
            return None
        numbers = {address: n for n, address in enumerate(addresses) if address}
        arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
        slots = []
        for place, argument in enumerate(arguments):
            base = _base(argument)
            if base is None:
                continue
            address, form = base.data_ptr(), _form(argument)
            if not address:  # of no elements
                arguments[place] = form(0)
                continue
            if address not in numbers:
                return None
            slots.append((place, numbers[address], form))
        if not launch.programs:
            return _Replay(None, (), ())
        compiled = launch.compile()
        replay = _Replay(compiled[(launch.programs, 1, 1)], arguments, slots)
        packed = Packed.of(replay.run, len(addresses)) if _is_plain(compiled.metadata) else None
        return packed or replay

    def run(self, addresses: Sequence[int]) -> None:
        if self.launch is None:
            return
        arguments = self.arguments.copy()
        for place, number, form in self.slots:
            arguments[place] = form(addresses[number])
        self.launch(*arguments)


class _At:
    """The part of a tensor's interface that a launch reads."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def facts_of(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """The properties of tensors that launches may depend on, except their addresses."""
    facts: list[Hashable] = []
    for x in tensors:
        facts.append(None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()))
    return tuple(facts)


def of_keys(keys: Sequence[Keys]) -> list[Tensor]:
    """The tensors of its sources that a forward pass reads."""
    tensors = []
    for each in keys:
        tensors += [each.k, each.v, each.rows.row_lo, each.rows.row_hi]
    return tensors


def of_dropout(dropout: Dropout, keys: Sequence[Keys]) -> list[Tensor | None]:
    """The tensors that a pass over the keys of these sources reads to drop pairs."""
    return [dropout.seed, keys[0].rows.q_positions, *(each.rows.k_positions for each in keys)]


def of_state(into: Partial) -> list[Tensor | None]:
    """The tensors of its softmax state that a forward pass reads and writes."""
    state = into.running
    if state is None:
        return [into.final, into.lse, into.counter, into.maxima, None, None]
    return [into.final, into.lse, into.counter, state.maximum, state.total, state.weighted]


def _base(argument: Any) -> Tensor | None:
    """The tensor whose address an argument has: a tensor, ``(tensor, strides...)`` or a descriptor; else None."""
    if isinstance(argument, tuple):
        argument = argument[0] if argument else None
    base = getattr(argument, "base", argument)
    return base if isinstance(base, Tensor) else None


def _form(argument: Any) -> Form:
    """How to make such an argument of another address. Triton accepts an integer as a pointer."""
    if isinstance(argument, Tensor):
        return int
    if isinstance(argument, tuple):
        rest = argument[1:]
        return lambda address: (address, *rest)
    kind, fields = type(argument), {**vars(argument), "base": None}

    def moved(address: int) -> Any:
        other = object.__new__(kind)
        vars(other).update(fields, base=_At(address))
        return other

    return moved


def _is_plain(metadata: Any) -> bool:
    """Whether a launch consists of its grid and parameters alone (no scratch memory, clusters or launch attributes)."""
    scratch = getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0)
    special = getattr(metadata, "launch_pdl", False) or getattr(metadata, "launch_cooperative_grid", False)
    return not (scratch or special) and getattr(metadata, "num_ctas", 1) == 1
