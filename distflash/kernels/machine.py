"""The properties of a GPU that compilation depends on, so that kernels can be compiled without one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """A GPU model.

    Attributes:
        arch: the compute capability of an NVIDIA GPU (90 for 9.0), or the architecture of an AMD GPU ("gfx942").
        multiprocessors: their number.
    """

    arch: int | str
    multiprocessors: int

    @property
    def family(self) -> str:
        """Its row in the table of tiles."""
        if isinstance(self.arch, str):
            return "gfx942"
        if self.arch // 10 == 9:
            return "sm_90"
        if self.arch // 10 in (10, 11):
            return "sm_100"
        return "sm_80" if self.arch in (80, 87) else "sm_86"


# One GPU of each family, by the name that the command line takes.
MACHINES = {
    "sm_80": Machine(80, 108),
    "sm_86": Machine(86, 84),
    "sm_90": Machine(90, 132),
    "sm_100": Machine(100, 148),
    "gfx942": Machine("gfx942", 304),
}


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The GPU model of a device."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Machine(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Machine(10 * properties.major + properties.minor, properties.multi_processor_count)
