"""Measure what launch/train.py trained on held-out text, on any number of ranks. `--help` lists the options.

python launch/evaluate.py --checkpoint runs/train                                                    # one rank
torchrun --standalone --nproc-per-node 2 launch/evaluate.py --seq-len 65536 --held-out book.txt
"""

import sys
from pathlib import Path


def job() -> int:
    from launch.inference_config import EvaluateConfig
    from launch.options import parse

    config = parse(EvaluateConfig, None)  # before torch is loaded: `--help` needs none

    from launch.evaluator import main

    return main(config)


if __name__ == "__main__":
    # A script's own folder leads the path: there the modules beside this one would be `data`, `model` and so on, in the
    # way of others. From the repository's root they are `launch.data` and `launch.model`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.process import end_with

    end_with(job)
