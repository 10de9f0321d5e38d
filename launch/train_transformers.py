"""Train a Llama of Transformers with its Trainer and every sequence spread over ranks. `--help` lists the options.

torchrun --standalone --nproc-per-node 2 launch/train_transformers.py --seq-len 2048          # 2 CPU processes or GPUs
torchrun --standalone --nproc-per-node 2 launch/train_transformers.py --seq-len 262144 --batch-size 1 --layers 16 \
    --dim 2048 --heads 32 --kv-heads 8 --ffn 8192 --vocab-size 128256 --rope-theta 5e5 --lr 3e-4 --steps 6 \
    --log-every 1 --checkpoint-activations                       # 1.2 B parameters; add --attention torch to compare
"""

import sys
from pathlib import Path


def job() -> int:
    from launch.options import parse
    from launch.transformers_config import TransformersConfig

    config = parse(TransformersConfig, None)  # before torch is loaded: `--help` needs none

    from launch.transformers_trainer import main

    return main(config)


if __name__ == "__main__":
    # A script's own folder leads the path: there the modules beside this one would be `data`, `model` and so on, in the
    # way of others. From the repository's root they are `launch.data` and `launch.model`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.process import end_with

    end_with(job)
