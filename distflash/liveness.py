"""Which rows a forward pass works on, and whose softmax starts or ends in it.

The state of a softmax between passes is float32. Under a window most rows have seen all their keys after the first
pass: they end there, and later passes neither load nor store their state. Rows that see their first key in a later pass
start there. A pass leaves out all rows that see none of its keys.

Rows come in groups of GROUP_ROWS, so that a kernel's block of rows has one answer.

[Note: shapes] T local queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distflash.upload import upload

GROUP_ROWS = 384  # a multiple of the number of rows in a block, of every kernel

# What happens to a group of rows in a pass, as flags: its rows are worked on; from no key or the sinks; to the result.
LIVE, STARTS, ENDS = 1, 2, 4
# Flags are of heads that take all sources of the pass. Those of heads below `Pass.begun` stand so many bits higher.
BEGUN_BITS = 3


@dataclass(frozen=True, eq=False)
class LiveRows:
    """The groups that a pass works on. It does not touch the state or the result of any other row.

    Attributes:
        groups: int32 ``[N, 2]``, contiguous: the first row of each group, ascending, and its flags.
        count: the number of rows. All groups have GROUP_ROWS, but that with the last local row may have fewer.
    """

    groups: Tensor
    count: int

    def to(self, device: torch.device) -> LiveRows:
        return LiveRows(upload(self.groups, device), self.count)


def all_rows(first: bool, last: bool, begun: bool) -> int:
    """The flags where all rows start in the ``first`` pass and end in the ``last``. Heads that have begun go on."""
    flags = LIVE | ENDS * last
    return flags | STARTS * first | (flags << BEGUN_BITS) * begun


def groups_that_see(row_lo: Tensor, row_hi: Tensor) -> Tensor:
    """Whether any row of each group sees a key, from the ends of its intervals: bool ``[ceil(T / GROUP_ROWS)]``."""
    seen = (row_hi > row_lo).cpu()
    return torch.nn.functional.pad(seen, (0, -len(seen) % GROUP_ROWS)).view(-1, GROUP_ROWS).any(1)


def live_rows(seen: Tensor, visits: range, begun: bool, rows: int) -> LiveRows:
    """The live rows of a pass.

    Args:
        seen: bool ``[visits, groups]``. Every head takes the sources of a plan in one order, some of them two in a
            pass; this tells for each source in turn which groups see a key in it.
        visits: which of these the pass makes.
        begun: whether some heads make the last one only.
        rows: T.
    """
    seen = seen.clone()
    seen[0] |= ~seen.any(0)  # rows that see no key at all start and end in the first one
    before, after = (seen[some].any(0) for some in (slice(visits.start), slice(visits.stop, None)))
    flags = torch.zeros(seen.shape[1], dtype=torch.int32)
    for bits, some in ((0, visits), *[(BEGUN_BITS, visits[-1:])] * begun):
        earlier = before | seen[visits.start : some.start].any(0)
        live = seen[some.start : some.stop].any(0)
        flags |= live * (LIVE | STARTS * ~earlier | ENDS * ~after).int() << bits
    (numbers,) = flags.nonzero(as_tuple=True)
    groups = torch.stack([numbers * GROUP_ROWS, flags[numbers]], 1).int()
    return LiveRows(groups, sum(min(GROUP_ROWS, rows - start) for start, _ in groups.tolist()))
