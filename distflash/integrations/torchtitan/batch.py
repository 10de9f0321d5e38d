"""Documents of a batch, from the positions of torchtitan's data loaders.

[Note: shapes] B batch, S global tokens.
"""

from __future__ import annotations

from torch import Tensor

from distflash.masks import Documents
from distflash.rows import Rows

NO_POSITIONS = (
    'positions: the data loader gives none, so that nobody knows where documents end; have it yield {"input": tokens, '
    '"positions": int64 [B, S]}, which begin with 0 in each document'
)


def documents_of(positions: Tensor) -> Documents | Rows | None:
    """The documents of a batch. As in torchtitan, each position 0 starts one.

    Args:
        positions: integers ``[B, S]``, of the whole sequences. On a GPU, the host synchronises.

    Returns:
        None if each sequence is one document.

    Raises:
        ValueError: a position is not one more than the one before within a document.
    """
    whole = positions.cpu()
    starts = whole == 0
    starts[:, 0] = True
    steps = whole.diff(dim=1) == 1
    if not bool((steps | starts[:, 1:]).all()):
        row, place = (~(steps | starts[:, 1:])).nonzero()[0].tolist()
        raise ValueError(
            f"positions: expected to rise by 1 within a document and to begin each with 0, but sequence {row} has "
            f"{whole[row, place].item()} and then {whole[row, place + 1].item()} at {place}"
        )
    rows = [[*starts[n].nonzero().flatten().tolist(), whole.shape[1]] for n in range(len(whole))]
    if all(len(row) == 2 for row in rows):
        return None
    if all(row == rows[0] for row in rows):
        return Documents(rows[0])
    return Rows([Documents(row) for row in rows])
