"""Reading NVIDIA machine code as `cuobjdump -sass` prints it: instructions, and the loops that do the work.

A loop is found in the graph of jumps and not by its first and last line: the assembler puts the waiting of barriers
behind the end of the kernel and jumps back from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
JUMPS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET")


@dataclass(frozen=True)
class Instruction:
    """One line; ``predicate`` is empty where it is always executed."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def local(self) -> bool:
        """A load or store of a register that found no place."""
        return self.name.startswith(("LDL", "STL"))

    @property
    def mma(self) -> bool:
        return self.name.startswith(("HGMMA", "HMMA", "UTCHMMA"))

    @property
    def jumps(self) -> bool:
        return self.name.split(".")[0] in JUMPS

    @property
    def target(self) -> int | None:
        """Where it may jump to, if that stands in the code."""
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        # A barrier's outcome may be a predicate among the operands: `BRA P0, 0x40`, `BRA.DIV UR4, 0x40`.
        always = not self.predicate and self.operands.strip().startswith("0x")
        return not self.jumps or bool(self.predicate) or (self.name.startswith("BRA") and not always)


@dataclass(frozen=True)
class Loop:
    """An innermost loop around tensor-core instructions.

    Attributes:
        always: what every turn executes.
        sometimes: what some turns jump over, such as the masking of tiles at a border.
    """

    always: tuple[Instruction, ...]
    sometimes: tuple[Instruction, ...]


def parse(listing: str) -> tuple[Instruction, ...]:
    found = LINE.finditer(listing)
    return tuple(Instruction(int(m[1], 16), m[2] or "", m[3], m[4].strip()) for m in found)


def main_loops(instructions: Iterable[Instruction]) -> list[Loop]:
    """In the order of the code, each loop around tensor-core instructions that holds no smaller one."""
    blocks = _blocks(tuple(instructions))
    graph = _jumps(blocks)
    return [_loop(graph.subgraph(nodes), blocks) for nodes in sorted(_innermost(graph, graph, blocks), key=min)]


Blocks = dict[
    int, tuple[Instruction, ...]
]  # by the address of the first instruction: no jump but the last's, or into it


def _blocks(instructions: tuple[Instruction, ...]) -> Blocks:
    targets = {i.target for i in instructions}
    starts = [n for n, i in enumerate(instructions) if not n or i.address in targets or instructions[n - 1].jumps]
    ends = [*starts[1:], len(instructions)]
    return {instructions[a].address: instructions[a:b] for a, b in zip(starts, ends, strict=False)}


def _jumps(blocks: Blocks) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(blocks)
    for start, block in blocks.items():
        if block[-1].target in blocks:
            graph.add_edge(start, block[-1].target)
    graph.add_edges_from((a, b) for a, b in pairwise(blocks) if blocks[a][-1].falls_through)
    return graph


def _innermost(part: nx.DiGraph, whole: nx.DiGraph, blocks: Blocks) -> Iterator[set[int]]:
    """The cycles around matrix products of a part; without the blocks that one enters by, only inner cycles remain."""
    for nodes in _cycles(part):
        if not any(_multiplies(blocks[n]) for n in nodes):
            continue
        entries = {n for n in nodes if any(before not in nodes for before in whole.predecessors(n))}
        inner = list(_innermost(whole.subgraph(nodes - entries), whole, blocks)) if entries else []
        yield from inner or [nodes]


def _cycles(graph: nx.DiGraph) -> Iterator[set[int]]:
    for nodes in nx.strongly_connected_components(graph):
        if len(nodes) > 1 or any(graph.has_edge(n, n) for n in nodes):
            yield set(nodes)


def _loop(graph: nx.DiGraph, blocks: Blocks) -> Loop:
    """A block can be jumped over if there is a way round the loop without it that misses no matrix product."""
    products = {n for n in graph if _multiplies(blocks[n])}
    always: list[Instruction] = []
    sometimes: list[Instruction] = []
    for n in sorted(graph):
        without = graph.subgraph(set(graph) - {n})
        skipped = any(products <= nodes for nodes in _cycles(without))
        (sometimes if skipped else always).extend(blocks[n])
    return Loop(tuple(always), tuple(sometimes))


def _multiplies(block: tuple[Instruction, ...]) -> bool:
    return any(i.mma for i in block)
