"""Give a trained decoder fewer key heads, and train it on for a share of its steps. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/uptrain.py --source runs/train --kv-heads 2
python launch/uptrain.py --source runs/train --kv-heads 2 --compare                 # one rank, no launcher
"""

import sys
from pathlib import Path


def job() -> int:
    from launch.options import parse
    from launch.uptrain_config import UptrainConfig

    config = parse(UptrainConfig, None)  # before torch is loaded: `--help` needs none

    from launch.uptraining import main

    return main(config)


if __name__ == "__main__":
    # A script's own folder leads the path: there the modules beside this one would be `data`, `model` and so on, in the
    # way of others. From the repository's root they are `launch.data` and `launch.model`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.process import end_with

    end_with(job)
