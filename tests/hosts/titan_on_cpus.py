"""torchtitan is written for GPUs: small things in the places of a few that only GPUs have.

To be imported before torchtitan's other modules, which take these names from its utilities.
"""

import types
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.tools import utils


class Device(types.ModuleType):
    """In the place of ``torch.cuda``: what is not below returns None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "device_count":
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def current_device(self) -> int:
        return 0

    def get_device_name(self, *_: Any) -> str:
        return "cpu"

    def get_device_properties(self, *_: Any) -> Any:
        return types.SimpleNamespace(total_memory=1 << 30)

    def memory_stats(self, *_: Any) -> dict[str, int]:
        return {}


utils.device_type, utils.device_module = "cpu", Device("cpu")
utils.get_local_device = lambda: torch.device("cpu")
dist.set_timeout = lambda *_: None

import torchtitan.distributed.utils  # noqa: E402

torchtitan.distributed.utils.init_distributed = lambda *_, **__: dist.get_world_size()
