"""A stub GPU, to run the host's part of calls on a machine without one.

Kernels are compiled for a Hopper GPU, and launches return at once. Tensors are in CPU memory, and outputs are
uninitialised.
"""

from __future__ import annotations

from triton.runtime import driver

from distflash.kernels import Hopper, Kernel, Triton
from distflash.kernels.machine import MACHINES
from distflash.kernels.triton.compiling import NoGpu

MACHINE = MACHINES["sm_90"]
KERNELS: dict[str, Kernel] = {"hopper": Hopper(machine=MACHINE), "triton": Triton(machine=MACHINE)}


def start() -> None:
    """From now on triton launches nothing. For a process that has no other use for it."""
    driver.set_active(NoGpu(MACHINE))
