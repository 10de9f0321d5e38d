#!/usr/bin/env bash
# Sets up .venv and runs the whole test-suite; the last line is its total.
#   bash launch/test.sh                        everything; tests that need a GPU are skipped, and counted, without one
#   bash launch/test.sh --quick                under a minute on two cores: see QUICK
#   bash launch/test.sh tests/pure -k zigzag   one pytest with these arguments
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# One thread a process: tests are spread over the cores as processes.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

# More than eight workers gain nothing: the tests that start processes would crowd each other out.
cores=$(getconf _NPROCESSORS_ONLN)
spread=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    spread=(-n "$((cores < 8 ? cores : 8))" --dist worksteal)
fi

run_pytest() { "$PYTHON" -m pytest -q "$@" </dev/null; }

# What attention over ranks is made of, each layer by one file, the exactness of all of it on simulated ranks, and the
# transport over real processes. Without what is marked as slow, and with a tenth of the random examples.
QUICK=(tests/pure/test_{masks,layouts,intervals,partial,reference,collectives,validation,context,engine,api}.py
    tests/distributed/test_distributed.py)

if [[ ${1:-} == --quick ]]; then
    run_pytest "${spread[@]}" --few -m "not slow" "${QUICK[@]}" "${@:2}"
    exit
fi
if (($# > 0)); then
    run_pytest "$@"
    exit
fi
if ((GPUS == 0)); then
    run_pytest "${spread[@]}"
    exit
fi

# With GPUs there are two runs, since tests/kernels turns Triton's interpreter on for its whole process; and the
# GPU tests one after another, since they share the devices.
failed=0
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
say "tests/gpu on $GPUS GPU(s)"
run_pytest tests/gpu | tee "$logs/gpu" || failed=1
say "the other folders on $cores cores"
TRITON_INTERPRET=1 run_pytest --ignore=tests/gpu "${spread[@]}" | tee "$logs/cpu" || failed=1
say "both runs together"
tail -qn 1 "$logs"/* | grep -oE '[0-9]+ [a-z]+' |
    awk '{ count[$2] += $1 } END { for (what in count) printf "%s%d %s", (n++ ? ", " : ""), count[what], what; print "" }'
exit "$failed"
