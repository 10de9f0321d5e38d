"""Live rows: which rows (queries) a forward pass works on, and for which of them it is the first or the last pass.

A pass skips the rows that see none of its keys, so it neither loads nor stores their float32 softmax state. With a
window, most rows see keys in one pass only. A row starts in the first pass in which it sees a key, and ends in the
last.

Rows are in groups of GROUP_ROWS, so that all rows of a kernel's block have the same flags.

[Note: shapes] T local queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.host_to_device import to_device

GROUP_ROWS = 384  # a multiple of the number of rows in a block, of every kernel

# Flags of a group of rows in a pass: the pass works on it; it starts from the identity or the sinks; it writes the
# result.
LIVE, STARTS, ENDS = 1, 2, 4
# The low bits are the flags of heads that attend to all sources of the pass. Heads below `Pass.begun` have theirs
# shifted left by this many bits.
BEGUN_BITS = 3


@dataclass(frozen=True, eq=False)
class LiveRows:
    """The groups of rows that a pass works on. It leaves the state and the result of all other rows unchanged.

    Attributes:
        groups: int32 ``[N, 2]``, contiguous: the first row of each group, ascending, and its flags.
        count: the number of rows. Each group has GROUP_ROWS; only the group with the last local row may have fewer.
    """

    groups: Tensor
    count: int

    def to(self, device: torch.device) -> LiveRows:
        return LiveRows(to_device(self.groups, device), self.count)


def all_rows(first: bool, last: bool, begun: bool) -> int:
    """The flags of all rows of a pass without `LiveRows`. Begun heads continue from their running state."""
    flags = LIVE | ENDS * last
    return flags | STARTS * first | (flags << BEGUN_BITS) * begun


def groups_that_see(row_lo: Tensor, row_hi: Tensor) -> Tensor:
    """Whether any row of each group sees a key: bool ``[ceil(T / GROUP_ROWS)]``."""
    seen = (row_hi > row_lo).cpu()
    return torch.nn.functional.pad(seen, (0, -len(seen) % GROUP_ROWS)).view(-1, GROUP_ROWS).any(1)


def live_rows(seen: Tensor, visits: range, begun: bool, rows: int) -> LiveRows:
    """The live rows of a pass.

    Args:
        seen: bool ``[sources, groups]``: for the sources of a plan in order (all heads have the same order), which
            groups see a key of the source.
        visits: the indices of the pass's sources.
        begun: whether some heads attend to the last of them only.
        rows: T.
    """
    seen = seen.clone()
    seen[0] |= ~seen.any(0)  # rows with no visible key start and end in the first pass
    before, after = (seen[some].any(0) for some in (slice(visits.start), slice(visits.stop, None)))
    flags = torch.zeros(seen.shape[1], dtype=torch.int32)
    for bits, some in ((0, visits), *[(BEGUN_BITS, visits[-1:])] * begun):
        earlier = before | seen[visits.start : some.start].any(0)
        live = seen[some.start : some.stop].any(0)
        flags |= live * (LIVE | STARTS * ~earlier | ENDS * ~after).int() << bits
    (numbers,) = flags.nonzero(as_tuple=True)
    groups = torch.stack([numbers * GROUP_ROWS, flags[numbers]], 1).int()
    return LiveRows(groups, sum(min(GROUP_ROWS, rows - start) for start, _ in groups.tolist()))
