"""Train a byte-level decoder on sequences that are spread over all ranks. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/train.py --seq-len 2048
python launch/train.py                                                      # one rank, no launcher
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder leads the path. The repository's root, in its place, has `distflash`, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from distflash.recipes.console import script

    script("train")
