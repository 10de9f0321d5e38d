"""Measure what launch/train.py trained on held-out text, on any number of ranks. `--help` lists the options.

python launch/evaluate.py --checkpoint runs/train                                                    # one rank
torchrun --standalone --nproc-per-node 2 launch/evaluate.py --seq-len 65536 --held-out book.txt
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder leads the path. The repository's root, in its place, has `distflash`, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from distflash.recipes.console import script

    script("evaluate")
