#!/usr/bin/env bash
# Sets up .venv, then trains a small model on sequences that lie on two ranks, and replays the first batch on one rank
# to show that the attention is exact. Ends with a line that the model writes. Under five minutes on two CPU cores.
#   bash launch/quickstart.sh [more options of launch/train.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

out=runs/quickstart
device=()
if ((GPUS >= 2)); then
    say "training on 2 of $GPUS GPUs"
    options=(--seq-len 16384 --batch-size 1 --dim 512 --layers 8 --heads 8 --kv-heads 4 --lr 1e-3)
else
    ((GPUS == 0)) || say "one GPU is no ring, so its CPU takes over"
    say "training on 2 CPU processes"
    device=(--device cpu)
    options=() # the defaults are a model of the right size
fi

export OMP_NUM_THREADS=1 # a rank a core
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 launch/train.py \
    "${device[@]}" "${options[@]}" --seed 0 --verify --overwrite --out "$out" "$@"

say "the loss is drawn in $PWD/$out/loss.png"

prompt='    def get_'
say "a line that it writes over 2 ranks, after '$prompt'"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 launch/generate.py "${device[@]}" \
    --checkpoint "$out" --prompt "$prompt" --temperature 0.5 --stop $'\n' --max-new-tokens 100
