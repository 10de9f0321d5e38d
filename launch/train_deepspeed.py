"""Train with DeepSpeed on pipe x data x context ranks. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/train_deepspeed.py --deepspeed launch/configs/zero3.json --seq-len 2048
torchrun --standalone --nproc-per-node 4 launch/train_deepspeed.py --deepspeed launch/configs/pipeline.json --pipe 2 \
    --batch-size 8 --seq-len 2048                          # 2 stages of 2 ranks for each sequence, 8 micro-batches
deepspeed --no_local_rank --num_gpus 8 launch/train_deepspeed.py --data-parallel 2 --seq-len 131072
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder leads the path. The repository's root, in its place, has `distflash`, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from distflash.recipes.console import script

    script("train-deepspeed")
