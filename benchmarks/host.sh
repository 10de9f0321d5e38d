#!/usr/bin/env bash
# What the ring does on the GPUs of this host, by one command: its tests, its rate beside other rings, under a window and
# with packed documents, its memory, and the longest sequences of one call and of the main job.
#   bash benchmarks/host.sh          # all GPUs
#   bash benchmarks/host.sh 4 8      # the first 4 of them, then the first 8
# Every step runs, whether or not the one before passed; those that failed are named at the end. Records and pictures go
# to benchmarks/results. Where there is no GPU the same commands run on CPU processes at sizes of no interest, into
# runs/host, and without tests and memory, which need GPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

failed=()
step() { # title, command
    say "$1, $ranks ranks"
    "${@:2}" || failed+=("$1, $ranks ranks")
}

spread() { # what each rank runs
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@"
}

longest_job() { # options of the main job; tries one length after the other, until one does not fit
    local length longest=
    for length in "${job_lengths[@]}"; do
        spread launch/train.py --seq-len "$length" --steps 3 --batch-size 1 --log-every 1 --checkpoint-activations \
            --overwrite --out "runs/host/train-$ranks" "$@" || break
        longest=$length
    done
    [[ -n $longest ]] && say "the main job takes $longest tokens on $ranks ranks"
}

on_this_host() { # sets sizes for $ranks ranks, then runs everything
    if ((GPUS > 0)); then
        export CUDA_VISIBLE_DEVICES
        CUDA_VISIBLE_DEVICES=$(cut -d, -f "1-$ranks" <<<"$visible")
        local lengths=(65536 131072 524288 1048576) longest=$((ranks * 524288)) few=16384 common=()
        local job_lengths=($((ranks * 131072)) $((ranks * 262144)) $((ranks * 524288)) $((ranks * 1048576)))
        local job=(--dim 1024 --layers 8 --heads 8 --kv-heads 2 --rope-theta 1e6 --lr 3e-4)
        step "tests" "$PYTHON" -m pytest -q -m gpu tests/gpu/test_ring.py --ranks "$ranks"
        step "memory" spread -m benchmarks.memory --seq-lens "${lengths[@]}"
    else
        export OMP_NUM_THREADS=1
        local lengths=(256 512) longest=1024 few=64 job_lengths=(256 512) job=(--device cpu)
        local common=(--heads 4 --kv-heads 2 --head-dim 16 --dtype float32 --device cpu --seconds 0.01 --out runs/host)
    fi
    step "ring and its peers" spread -m benchmarks.ring --peers --seq-lens "${lengths[@]}" "${common[@]}"
    step "head dim 64" spread -m benchmarks.ring --seq-lens $((ranks * few)) "${common[@]}" --head-dim 64 --name "ring-64-$ranks"
    step "head dims 192 and 128" spread -m benchmarks.ring --seq-lens $((ranks * few)) "${common[@]}" --heads 16 \
        --kv-heads 16 --head-dim 192 --value-head-dim 128 --name "ring-192-$ranks"
    step "window" spread -m benchmarks.ring --mask window4096 --seq-lens "${lengths[@]}" "${common[@]}"
    step "documents" spread -m benchmarks.ring --mask documents --seq-lens "${lengths[@]}" "${common[@]}"
    step "longest call" spread -m benchmarks.ring --seq-lens "$longest" --name "ring-longest-$ranks" "${common[@]}"
    step "main job" longest_job "${job[@]}"
}

visible=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))} # all that the caller shows
((GPUS > 0)) || say "no GPU here: a rehearsal on CPU processes"
for ranks in "${@:-$((GPUS > 1 ? GPUS : 2))}"; do
    ((GPUS == 0 || ranks <= GPUS)) || refuse "$ranks ranks need as many GPUs; there are $GPUS."
    on_this_host
done
((${#failed[@]} == 0)) || refuse "failed: $(printf '%s; ' "${failed[@]}")"
