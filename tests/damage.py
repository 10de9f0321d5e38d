"""Ways to damage a checkpoint's file: a flipped bit, and a pickle that runs code."""

from pathlib import Path


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit of one byte: 0 for the first, 1 for the last."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 4
    path.write_bytes(content)


class Attack:
    """A pickle that makes a file `mark` when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)
