"""Which families of Transformers are exact over ranks: tried with the installed library, and written into the docs.

python -m tools.transformers_families llama roberta      # these, on the screen
python -m tools.transformers_families --write            # all, in some minutes, into docs/transformers.md
python -m tools.transformers_families llama --write      # only this row, where the others are of the same versions
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import distflash as df
from tools.families import HEADS, Family, families, outcome

PAGE = Path(__file__).resolve().parents[1] / "docs" / "transformers.md"
_BEGIN, _END = "<!-- families: begin -->", "<!-- families: end -->"
# A rank that waits for one that has raised something unforeseen is freed after this time.
_TIMEOUT = timedelta(seconds=10)


def tried(family: Family, store: dist.Store) -> str:
    """The family's outcome on all ranks, each of which calls; where they differ, one after the other."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # A group of its own, since one in which ranks have raised at different places is of no further use.
    group = dist.new_group(timeout=_TIMEOUT)
    try:
        own = outcome(family, df.ContextParallel(group))
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        own = f"{type(error).__name__} in {Path(line.filename).name}:{line.lineno}: {error}"
    key = f"{family.class_name}/{family.model_type}/{family.head}"
    store.set(f"{key}/{rank}", own)
    outcomes = [store.get(f"{key}/{other}").decode() for other in range(world_size)]
    dist.destroy_process_group(group)
    return " || ".join(dict.fromkeys(outcomes))


def run_rank(rank: int, ranks: int, folder: str, chosen: Sequence[Family], write: bool) -> None:
    """One process of those that try all families together."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks)
    store = dist.FileStore(f"{folder}/outcomes", ranks)
    rows = []
    for family in chosen:
        rows.append((family, tried(family, store)))
        if rank == 0:
            print(*row(*rows[-1]), sep=" | ", flush=True)
    if rank == 0 and write:
        PAGE.write_text(with_table(PAGE.read_text(), rows, ranks))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads are not waited for


def row(family: Family, text: str) -> tuple[str, str, str]:
    """Of the table: family, class, result."""
    return family.model_type, family.class_name, " ".join(re.sub(r"(?<!\\)\|", r"\\|", text).split())


def published(page: str) -> dict[tuple[str, str, str], str]:
    """The table's results, by family, class and head. Families that have both heads have the masked one second."""
    table = page[page.index(_BEGIN) : page.index(_END)]
    found: dict[tuple[str, str, str], str] = {}
    for model_type, class_name, text in re.findall(r"^\| (\S+) \| `(\w+)` \| (.*) \|$", table, re.MULTILINE):
        causal = (model_type, class_name, "causal")
        is_causal = class_name in _names("causal", model_type) and causal not in found
        found[causal if is_causal else (model_type, class_name, "masked")] = text
    return found


def _names(head: str, model_type: str) -> tuple[str, ...]:
    names = HEADS[head].get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def with_table(page: str, tried: Sequence[tuple[Family, str]], ranks: int) -> str:
    """The page with these rows in the table between its marks, and its other rows as they were."""
    made = f"on {ranks} ranks beside `eager` on one, in float32, with "
    made += f"transformers {transformers.__version__} and torch {torch.__version__}."
    results = {(family.model_type, family.class_name, family.head): text for family, text in tried}
    before = published(page)
    rows = []
    for family in families():
        key = family.model_type, family.class_name, family.head
        text = results.get(key) or before.get(key)
        if text is None or (key not in results and made not in page):
            raise ValueError(f"{family.class_name}: the table has no result with {made} Write all families")
        rows.append((family, text))
    equal = sum(text.startswith("equal") for _, text in rows)
    lines = [
        f"{equal} of {len(rows)} classes are equal, {made}",
        "",
        "| family | class | result |",
        "|---|---|---|",
        *("| {} | `{}` | {} |".format(*row(family, text)) for family, text in rows),
    ]
    table = "\n".join([_BEGIN, *lines, _END])
    return re.sub(f"{_BEGIN}.*{_END}", lambda _: table, page, flags=re.DOTALL)


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all if left out")
    parser.add_argument("--head", choices=("causal", "masked"), help="only these classes")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write these families' rows into {PAGE.name}")
    options = parser.parse_args()
    every = [f for f in families() if options.head in (None, f.head)]
    chosen = [f for f in every if f.model_type in options.families or not options.families]
    with tempfile.TemporaryDirectory() as folder:
        # Forked, since on CPUs they can be, and each would load the libraries for as long as its work takes.
        arguments = (options.ranks, folder, chosen, options.write)
        torch.multiprocessing.start_processes(run_rank, arguments, nprocs=options.ranks, start_method="fork")


if __name__ == "__main__":
    main()
