"""Continue a text with what launch/train.py trained, on any number of ranks. `--help` lists the options.

python launch/generate.py --checkpoint runs/train --prompt "def main("                              # one rank
torchrun --standalone --nproc-per-node 2 launch/generate.py --prompt-file README.md --max-new-tokens 500
cat setup.cfg | torchrun --standalone --nproc-per-node 2 launch/generate.py --temperature 0 2>/dev/null
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # As in train.py: modules are found from the repository's root, and an ordinary exit is not waited for.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.inference_config import GenerateConfig
    from launch.options import parse

    config = parse(GenerateConfig, None)  # before torch is loaded: `--help` needs none

    from launch.generator import main

    code = main(config)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
