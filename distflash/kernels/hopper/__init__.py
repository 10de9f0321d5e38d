from distflash.kernels.hopper.kernel import Hopper

__all__ = ["Hopper"]
