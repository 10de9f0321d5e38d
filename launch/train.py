"""Train a byte-level decoder on sequences that are spread over all ranks. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/train.py --seq-len 2048
python launch/train.py                                                      # one rank, no launcher
"""

import sys
from pathlib import Path


def job() -> int:
    from launch.config import TrainConfig
    from launch.options import parse

    config = parse(TrainConfig, None)  # before torch is loaded: `--help` needs none

    from launch.trainer import main

    return main(config)


if __name__ == "__main__":
    # A script's own folder leads the path: there the modules beside this one would be `data`, `model` and so on, in the
    # way of others. From the repository's root they are `launch.data` and `launch.model`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.process import end_with

    end_with(job)
