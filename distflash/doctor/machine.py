"""Versions, GPUs, and peer access between GPUs of one host."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from distflash import __version__
from distflash.doctor.findings import Finding
from distflash.kernels.versions import RANGE, is_tested

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
OPTIONAL = ("triton", "einops", "deepspeed", "transformers")


def versions() -> Iterator[Finding]:
    """Versions of required packages, and of optional ones if they are installed."""
    python = platform.python_version_tuple()
    old = tuple(map(int, python[:2])) < OLDEST_PYTHON
    yield Finding("python", platform.python_version(), f"needs {'.'.join(map(str, OLDEST_PYTHON))}" if old else "")
    yield Finding("distflash", __version__, same=True)
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    old_torch = release < OLDEST_TORCH
    yield Finding("torch", torch.__version__, "pip install 'torch>=2.11'" if old_torch else "", same=True)
    yield Finding("cuda of torch", str(torch.version.cuda or torch.version.hip or "none: a build for CPUs"))
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        yield Finding("nccl", ".".join(map(str, torch.cuda.nccl.version())), same=True)
    for name in OPTIONAL:
        yield Finding(name, _version(name), same=True)


def _version(name: str) -> str:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    return version if name != "triton" or is_tested(version) else f"{version}: not tested, {RANGE} are"


def gpus(device: torch.device) -> Iterator[Finding]:
    """This rank's device, and the GPUs of the host to which it has peer access."""
    if device.type != "cuda":
        yield Finding("device", f"CPU, {torch.get_num_threads()} threads")
        return
    found = torch.cuda.get_device_properties(device)
    memory, _ = torch.cuda.mem_get_info(device)
    yield Finding(
        f"GPU {device.index}",
        f"{found.name}, sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors, "
        f"{memory / 2**30:.0f} of {found.total_memory / 2**30:.0f} GiB free",
        "" if memory > 2**30 else "another process holds its memory: end it, or leave this GPU out",
    )
    others = [n for n in range(torch.cuda.device_count()) if n != device.index]
    apart = [n for n in others if not torch.cuda.can_device_access_peer(device, torch.device("cuda", n))]
    if others:
        reach = "all others directly" if not apart else f"not directly: {', '.join(map(str, apart))}"
        yield Finding(f"GPU {device.index} reaches", reach)
