"""Kernels, importable without triton or a GPU."""

from distflash.kernels.base import Kernel, Problem
from distflash.kernels.reference import Reference
from distflash.kernels.triton import Triton

__all__ = ["Kernel", "Problem", "Reference", "Triton"]
