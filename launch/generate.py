"""Continue a text with what launch/train.py trained, on any number of ranks. `--help` lists the options.

python launch/generate.py --checkpoint runs/train --prompt "def main("                              # one rank
torchrun --standalone --nproc-per-node 2 launch/generate.py --prompt-file README.md --max-new-tokens 500
cat setup.cfg | torchrun --standalone --nproc-per-node 2 launch/generate.py --temperature 0 2>/dev/null
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder leads the path. The repository's root, in its place, has `distflash`, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from distflash.recipes.console import script

    script("generate")
