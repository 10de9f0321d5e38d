from distflash.kernels.triton.kernel import Triton

__all__ = ["Triton"]
