"""Continue a text with what launch/train.py trained, on any number of ranks. `--help` lists the options.

python launch/generate.py --checkpoint runs/train --prompt "def main("                              # one rank
torchrun --standalone --nproc-per-node 2 launch/generate.py --prompt-file README.md --max-new-tokens 500
cat setup.cfg | torchrun --standalone --nproc-per-node 2 launch/generate.py --temperature 0 2>/dev/null
"""

import sys
from pathlib import Path


def job() -> int:
    from launch.inference_config import GenerateConfig
    from launch.options import parse

    config = parse(GenerateConfig, None)  # before torch is loaded: `--help` needs none

    from launch.generator import main

    return main(config)


if __name__ == "__main__":
    # A script's own folder leads the path: there the modules beside this one would be `data`, `model` and so on, in the
    # way of others. From the repository's root they are `launch.data` and `launch.model`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.process import end_with

    end_with(job)
