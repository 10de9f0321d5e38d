"""Train with DeepSpeed on pipe x data x context ranks. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/train_deepspeed.py --deepspeed launch/configs/zero3.json --seq-len 2048
torchrun --standalone --nproc-per-node 4 launch/train_deepspeed.py --deepspeed launch/configs/pipeline.json --pipe 2 \
    --batch-size 8 --seq-len 2048                          # 2 stages of 2 ranks for each sequence, 8 micro-batches
deepspeed --no_local_rank --num_gpus 8 launch/train_deepspeed.py --data-parallel 2 --seq-len 131072
"""

import os
import sys
from pathlib import Path


def job() -> int:
    from launch.deepspeed_config import DeepSpeedConfig
    from launch.options import parse

    config = parse(DeepSpeedConfig, None)  # before torch is loaded: `--help` needs none
    os.environ["DS_ACCELERATOR"] = config.device_type  # which DeepSpeed reads when it is imported

    from launch.deepspeed_trainer import main

    return main(config)


if __name__ == "__main__":
    # A script's own folder leads the path: there the modules beside this one would be `data`, `model` and so on, in the
    # way of others. From the repository's root they are `launch.data` and `launch.model`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.process import end_with

    end_with(job)
