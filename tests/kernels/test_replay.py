"""distflash/kernels/replay.py and packed.py: a replay launches the same as building the launch again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from distflash.driver import Recorded
from distflash.kernels import packed
from distflash.kernels.launch import Launch
from distflash.kernels.replay import Replays, facts_of


class Device:
    """Stands in for a compiled kernel: it keeps the arguments of every launch, with numbers for addresses."""

    arg_names = ("x", "strided", "tiles", "empty", "count", "BLOCK")
    device_caches = ()

    def __init__(self) -> None:
        self.launched: list[list[Any]] = []
        self.builds = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            values = args or [named[name] for name in self.arg_names]
            self.launched.append([grid[0], *map(as_addresses, values)])

        return launch

    def run(self, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> Any:
        assert warmup
        return Compiled(self)


class Compiled:
    metadata = SimpleNamespace(num_ctas=2)  # so that nobody tries to record it with a driver

    def __init__(self, device: Device) -> None:
        self.device = device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.device[grid]


class Tiles:
    """As a tensor descriptor: `base` has the address."""

    def __init__(self, base: torch.Tensor, block: int) -> None:
        self.base, self.block = base, block


def as_addresses(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, tuple):
        return tuple(map(as_addresses, value))
    if isinstance(value, Tiles):
        return ("tiles", value.base.data_ptr(), value.block)
    return value


def run(replays: Replays, device: Device, x: torch.Tensor, y: torch.Tensor | None, block: int = 4) -> list[Any]:
    def build() -> Launch:
        device.builds += 1
        other = x if y is None else y
        arguments = dict(
            x=x, strided=(other, *other.stride()), tiles=Tiles(other, block), empty=x[:0], count=len(x), BLOCK=block
        )
        return Launch(device, len(x), arguments)

    replays.run((block, facts_of(x, y)), [x, y], build)
    other = x if y is None else y
    expected = [len(x), x.data_ptr(), (other.data_ptr(), *other.stride()), ("tiles", other.data_ptr(), block)]
    assert device.launched[-1] == [*expected, device.launched[-1][4], len(x), block]
    return device.launched[-1]


SHAPES = st.sampled_from([(2, 8), (3, 8), (3, 16)])


@given(st.lists(st.tuples(SHAPES, st.booleans(), st.booleans(), st.sampled_from([4, 8])), min_size=1, max_size=12))
def test_every_launch_is_that_of_its_own_tensors(calls: list[tuple[tuple[int, int], bool, bool, int]]):
    replays, device = Replays(), Device()
    for shape, two, same, block in calls:
        x = torch.empty(shape)
        y = None if not two else x if same else torch.empty(shape).t()
        run(replays, device, x, y, block)


def test_it_is_built_once():
    replays, device = Replays(), Device()
    for _ in range(5):
        run(replays, device, torch.empty(2, 8), torch.empty(2, 8))
    assert device.builds == 1 and len(device.launched) == 5


def test_tensors_at_one_address_are_not_remembered():
    replays, device = Replays(), Device()
    x = torch.empty(2, 8)
    run(replays, device, x, x)
    run(replays, device, torch.empty(2, 8), torch.empty(2, 8))
    assert device.builds == 2


def test_another_alignment_is_another_launch():
    replays, device = Replays(), Device()
    memory = torch.empty(64)
    run(replays, device, memory[:16].view(2, 8), None)
    run(replays, device, memory[1:17].view(2, 8), None)
    assert device.builds == 2


def test_a_copy_made_for_one_launch_is_made_for_each():
    replays, device = Replays(), Device()

    def build(x: torch.Tensor) -> Launch:
        device.builds += 1
        copy = -x
        arguments = dict(x=copy, strided=(copy, 1), tiles=Tiles(copy, 4), empty=x[:0], count=1, BLOCK=4)
        return Launch(device, 1, arguments)

    for _ in range(3):
        x = torch.empty(2, 8)
        replays.run("negated", [x], lambda x=x: build(x))
    assert device.builds == 3


def recorded(*parameters: int) -> Recorded:
    return Recorded(1, (1, 1, 1), (32, 1, 1), 0, tuple(n.to_bytes(8, "little") for n in parameters))


def test_what_differs_between_two_recordings_is_where_addresses_are():
    one, other = recorded(100, 7, 200, 100), recorded(1100, 7, 1200, 1100)
    assert packed._slots(one, other, [100, 200], [1100, 1200]) == [(0, 0), (2, 1), (3, 0)]


def test_a_difference_that_no_address_explains_is_not_packed():
    assert packed._slots(recorded(100, 5), recorded(1100, 6), [100], [1100]) is None
