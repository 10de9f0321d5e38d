"""Train a Llama of Transformers with FSDP2 and every sequence spread over ranks. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/train_transformers.py --seq-len 2048          # 2 CPU processes or GPUs
torchrun --standalone --nproc-per-node 2 launch/train_transformers.py --seq-len 262144 --batch-size 1 --layers 16 \
    --dim 2048 --heads 32 --kv-heads 8 --ffn 8192 --vocab-size 128256 --rope-theta 5e5 --lr 3e-4 --steps 6 \
    --log-every 1 --checkpoint-activations                       # 1.2 B parameters; add --attention torch to compare
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # As in train.py: modules are found from the repository's root, and an ordinary exit is not waited for.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.transformers_trainer import main

    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
