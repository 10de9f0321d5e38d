"""Measure what launch/train.py trained on held-out text, on any number of ranks. `--help` lists the options.

python launch/evaluate.py --checkpoint runs/train                                                    # one rank
torchrun --standalone --nproc-per-node 2 launch/evaluate.py --seq-len 65536 --held-out book.txt
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # As in train.py: modules are found from the repository's root, and an ordinary exit is not waited for.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.inference_config import EvaluateConfig
    from launch.options import parse

    config = parse(EvaluateConfig, None)  # before torch is loaded: `--help` needs none

    from launch.evaluator import main

    code = main(config)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
