"""A kernel that counts how often its forward runs."""

from distflash.kernels import Reference


class Counting(Reference):
    """Equal to no other kernel."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "forwards", 0)

    def forward(self, *args, **kwargs):
        object.__setattr__(self, "forwards", self.forwards + 1)
        super().forward(*args, **kwargs)
