"""Train a Llama of Transformers with its Trainer and every sequence spread over ranks. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/train_transformers.py --seq-len 2048          # 2 CPU processes or GPUs
torchrun --standalone --nproc-per-node 2 launch/train_transformers.py --seq-len 262144 --batch-size 1 --layers 16 \
    --dim 2048 --heads 32 --kv-heads 8 --ffn 8192 --vocab-size 128256 --rope-theta 5e5 --lr 3e-4 --steps 6 \
    --log-every 1 --checkpoint-activations                       # 1.2 B parameters; add --attention torch to compare
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder leads the path. The repository's root, in its place, has `distflash`, installed or not.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from distflash.recipes.console import script

    script("train-transformers")
