"""A GPU that does nothing: the host's part of real calls, on a machine without one.

Kernels are compiled as for a Hopper GPU and launched by a launcher that returns at once, on tensors in the CPU's
memory. What they would have written is whatever lies there.
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
