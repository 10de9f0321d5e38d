"""`distflash doctor`: checks of this machine, with one process or with the ranks of a launcher."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distflash.doctor import attention, machine, ring
from distflash.doctor.findings import Finding, from_json, merged, print_table, to_json
from distflash.rank_texts import RankTexts
from distflash.transport import Alone, Distributed

__all__ = ["diagnose"]


def diagnose(device: str | None = None, timeout: float = 120.0) -> int:
    """Run all checks on every rank, and print the findings of all on rank 0.

    Args:
        device: "cuda" or "cpu"; None for cuda if torch sees a GPU.
        timeout: seconds after which a rank that does not answer is a fault.

    Returns:
        0, or 1 on every rank if any found a fault.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_torchelastic_launched():
        return Examination(Alone(device=_device(kind, 0)), _device(kind, 0), timeout).run()
    own = _device(kind, dist.get_node_local_rank(0))
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout),
        device_id=own if kind == "cuda" else None,
    )
    assert dist.group.WORLD is not None
    code = Examination(Distributed(dist.group.WORLD), own, timeout).run()
    if code == 0:  # after a fault, destroying the group may hang
        dist.destroy_process_group()
    return code


@dataclass
class Examination:
    """The checks of one rank. Ranks exchange their findings after each section."""

    ranks: Alone | Distributed
    device: torch.device
    timeout: float
    faults: int = 0

    def __post_init__(self) -> None:
        self.texts = RankTexts(self.ranks, "distflash.doctor", patience=2 * self.timeout)

    def run(self) -> int:
        """Run all sections, and return the exit code."""
        alone = isinstance(self.ranks, Alone)
        self.section("Versions", machine.versions)
        self.section("Devices", lambda: machine.gpus(self.device))
        self.section("Kernels against float64", lambda: attention.kernels(self.device))
        if isinstance(self.ranks, Distributed) and self.ranks.world_size > 1:
            ranks = self.ranks
            if self.section("Messages", lambda: ring.messages(ranks, self.device)):
                self.section("Attention over all ranks", lambda: attention.over_ranks(ranks, self.device))
        if self.ranks.rank == 0:
            words = f"faults: {self.faults}" if self.faults else "nothing is wrong"
            more = " with this process; links between ranks are checked with --ranks 2"
            print(f"\n{words}{more if alone else f' on {self.ranks.world_size} ranks'}", flush=True)
        return 1 if self.faults else 0

    def section(self, title: str, check: Callable[[], Iterable[Finding]]) -> bool:
        """Run a section, and print the findings of all ranks. Returns whether there is no fault."""
        findings = _guarded(title, check)
        lines = merged([from_json(text) for text in self.texts.exchange(to_json(findings))])
        faults = sum(not finding.ok for finding, _ in lines)
        self.faults += faults
        if self.ranks.rank == 0:
            print_table(title, lines)
        return not faults


def _guarded(title: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check. An exception is a fault."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        findings.append(Finding(title.lower(), words, "the error says which part failed; later parts were left out"))
        print(f"distflash doctor: {title}: {words}", file=sys.stderr, flush=True)
    return findings


def _device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
