# shellcheck shell=bash disable=SC2034
# Sourced by quickstart.sh, test.sh and CI, never run by itself. Goes to the repository's root, makes .venv and
# installs distflash into it, and leaves two variables:
#   PYTHON  an interpreter that runs distflash
#   GPUS    how many CUDA devices that interpreter's torch sees
# DISTFLASH_PYTHON=/path/to/python takes an interpreter that already has torch, and installs nothing: for a
# machine without a network.
set -euo pipefail

say() { printf '\n== %s\n' "$*"; }

refuse() {
    printf 'distflash: %s\n' "$*" >&2
    exit 1
}

require_python() { # interpreter
    command -v "$1" >/dev/null || refuse "there is no '$1' here; install Python 3.11 or later."
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        refuse "needs Python 3.11 or later; '$1' is $("$1" -V 2>&1). Put a newer python3 first on the PATH."
}

# All that an installation depends on; a moved clone counts, since a venv holds absolute paths.
fingerprint() { # interpreter
    { pwd; "$1" -V; printf '%s\n' "${constraints[@]}"; cat setup.cfg setup.py pyproject.toml launch/constraints-cpu.txt; } | cksum
}

install() { # pip options
    .venv/bin/python -m pip install -qq -e '.[train,test,dev,docs]' "$@"
}

set_up_venv() {
    local stamp=.venv/.distflash-installed now
    local constraints=()
    nvidia-smi -L >/dev/null 2>&1 || constraints=(-c launch/constraints-cpu.txt)
    require_python python3
    now=$(fingerprint python3)
    if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$now" ]]; then
        return
    fi
    say "installing into .venv (a minute, or several where torch brings CUDA)"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv
    if ! install "${constraints[@]}"; then
        # Some indexes hold torch only as a CUDA build, which pins another triton than the constraints do. CI must
        # not drift to versions that nobody chose.
        [[ -n ${constraints[*]} && ${CI:-} != true ]] || refuse "pip could not install; its reason stands above."
        say "the versions in launch/constraints-cpu.txt do not install here: trying without them"
        install || refuse "pip could not install; its reason stands above."
    fi
    printf '%s\n' "$now" >"$stamp"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n ${DISTFLASH_PYTHON:-} ]]; then
    PYTHON=$DISTFLASH_PYTHON
    require_python "$PYTHON"
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
else
    set_up_venv
    PYTHON=$PWD/.venv/bin/python
fi
GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || refuse "'$PYTHON' cannot import torch."
