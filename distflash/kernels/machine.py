"""A GPU as compilation sees it, so that kernels can be compiled where there is none."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """A kind of GPU.

    Attributes:
        arch: an NVIDIA GPU's compute capability, 90 for 9.0; an AMD GPU's name, "gfx942".
        multiprocessors: how many it has.
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


# By the names of the command line: one GPU of each family.
MACHINES = {
    "sm_80": Machine(80, 108),
    "sm_86": Machine(86, 84),
    "sm_90": Machine(90, 132),
    "sm_100": Machine(100, 148),
    "gfx942": Machine("gfx942", 304),
}


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The GPU that this is."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Machine(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Machine(10 * properties.major + properties.minor, properties.multi_processor_count)
