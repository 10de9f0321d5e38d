"""Kernels, importable without triton or a GPU."""

from distflash.kernels.base import Kernel, Problem
from distflash.kernels.hopper import Hopper
from distflash.kernels.reference import Reference
from distflash.kernels.triton import Triton

__all__ = ["Hopper", "Kernel", "Problem", "Reference", "Triton"]
