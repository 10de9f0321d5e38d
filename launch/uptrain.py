"""Give a trained decoder fewer key heads, and train it on for a share of its steps. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/uptrain.py --kv-heads 1
python launch/uptrain.py --kv-heads 1 --compare                 # one rank, no launcher
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder leads the path. The repository's root, in its place, has `distflash`, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from distflash.recipes.console import script

    script("uptrain")
