"""Draw the pictures of records again, from their JSON alone: nothing is measured, and no GPU is needed.

python -m benchmarks.redraw                                   # all of benchmarks/results
python -m benchmarks.redraw benchmarks/results/kernels.json   # these
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import (
    checkpointing,
    common,
    decode,
    decode_ranks,
    dropout,
    gpt2,
    kernels,
    masks,
    memory,
    numerics,
    packing,
    pictures,
    prefill,
    profile_ring,
    ring,
    ring_steps,
    wall,
)

# What draws records whose names begin so; the longest beginning that fits counts. None: they have no picture.
DRAWN_BY: dict[str, pictures.Draw | None] = {
    "checkpointing-": checkpointing.draw,
    "decode": decode.draw,
    "decode-": decode_ranks.draw,
    "decode-sweep": None,
    "dropout": dropout.draw,
    "first-calls-": None,
    "gpt2": gpt2.draw,
    "kernels": kernels.draw,
    "masks-": masks.draw,
    "memory-": memory.draw,
    "numerics-": numerics.draw,
    "prefill-": prefill.draw,
    "profile-": profile_ring.draw,
    "ring-": ring.draw,
    "ring-steps-": ring_steps.draw,
    "wall-": wall.draw,
} | {f"packing-{part}": draw for part, (_, draw) in packing.PARTS.items()}


def drawn_by(name: str) -> pictures.Draw | None:
    """What draws the record of this name; None where a record has no picture."""
    return max(
        ((start, draw) for start, draw in DRAWN_BY.items() if name.startswith(start)),
        default=("", None),
        key=lambda found: len(found[0]),
    )[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="*", help="JSON files; by default all of benchmarks/results")
    for file in parser.parse_args().records or sorted(common.RESULTS.glob("*.json")):
        draw = drawn_by(file.stem)
        if draw is not None:
            pictures.save(json.loads(file.read_text()), draw, file.with_suffix(".png"))
            print(f"drew {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
