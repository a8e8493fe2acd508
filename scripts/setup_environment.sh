#!/usr/bin/env bash
# Creates .venv and installs the pinned dependencies, this project and its commands (mme, mme-launch) into it.
#
# Optional environment variables:
# MME_STACK: cuda or cpu; default: cuda if an NVIDIA driver answers, otherwise cpu.
# PYTHON: the interpreter (CPython 3.10 to 3.13); default: python3, otherwise the newest of python3.13 … python3.10.
# TORCH_INDEX_URL: the package index for torch only. The default index serves torch for CUDA on Linux; PyTorch's CPU index
#   serves the CPU build without gigabytes of CUDA packages.
# TORCH_SHA256: the required hash of the torch wheel from that index. All other files are checked against
#   requirements/locked/, which contains the hashes of PyPI's files.
# Does nothing if .venv is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
log=$venv/setup.log
stamp=$venv/installed

fail() {
    echo "setup: $*" >&2
    exit 1
}

suits() { # whether the interpreter runs, is CPython 3.10 to 3.13 and can create virtual environments
    "$1" -c 'import ensurepip, sys, venv
sys.exit(not (sys.implementation.name == "cpython" and (3, 10) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null
}

is_ours() { # whether .venv is a virtual environment; otherwise pip would install into the interpreter behind it
    suits "$venv/bin/python" && "$venv/bin/python" -c 'import os, sys
sys.exit(os.path.realpath(sys.prefix) != os.path.realpath(sys.argv[1]) or sys.prefix == sys.base_prefix)' "$venv"
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" || fail "PYTHON=$PYTHON: expected CPython 3.10 to 3.13 with the venv module"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no CPython 3.10 to 3.13 with the venv module found (Debian, Ubuntu: python3-venv); set PYTHON=/path/to/python3"
}

step() { # DESCRIPTION COMMAND…: logs the command's output and shows the end of the log on failure
    echo "setup: $1"
    shift
    if ! "$@" >>"$log" 2>&1; then
        tail -n 25 "$log" >&2
        fail "failed: $* (full output: $log)"
    fi
}

say_foreign_kernels() {
    "$venv/bin/python" - <<'PYTHON' >&2
from importlib.metadata import PackageNotFoundError, version
try:
    found = version("kernels")
    print(f"setup: warning: the package kernels {found} in .venv shadows this project's kernels: remove it with "
          "`.venv/bin/python -m pip uninstall kernels`")
except PackageNotFoundError:
    pass
PYTHON
}

stack=${MME_STACK:-}
if [ -z "$stack" ]; then
    stack=cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then stack=cuda; fi
fi
case $stack in
cpu | cuda) ;;
*) fail "MME_STACK=$stack: expected cpu or cuda" ;;
esac

wanted="$stack $(cat requirements/*.txt requirements/locked/*.txt setup.py scripts/setup_environment.sh | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && is_ours; then
    say_foreign_kernels
    exit 0
fi

if [ "$(cat "$venv/stack" 2>/dev/null || echo "$stack")" != "$stack" ] || ! is_ours; then
    python=$(find_python)
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
rm -f "$stamp"
echo "$stack" >"$venv/stack"
: >"$log"
echo "setup: installing into $venv ($("$venv/bin/python" -V), $stack build); this takes a few minutes"
pip=("$venv/bin/python" -m pip --require-virtualenv --disable-pip-version-check --no-input)
index=()
if [ -n "${TORCH_INDEX_URL:-}" ]; then index=(--index-url "$TORCH_INDEX_URL"); fi
locked=requirements/locked
hashed=("${pip[@]}" install --require-hashes --no-deps --no-build-isolation)

step "pip and setuptools" "${hashed[@]}" -r $locked/build.txt
torch=$(grep '^torch==' "requirements/$stack.txt")
step "torch build of the index" "${pip[@]}" install --dry-run --ignore-installed --no-deps --quiet \
    --report "$venv/torch.json" "${index[@]}" "$torch"
build=$("$venv/bin/python" -c 'import json, sys
print(json.load(open(sys.argv[1]))["install"][0]["metadata"]["version"])' "$venv/torch.json")
# torch comes first, because later packages would otherwise install another build. A build with a local version, such as
# 2.13.0+cpu, is not from PyPI, and its hash is not in requirements/locked.
if [[ $build != *+* ]]; then
    step "torch $build" "${hashed[@]}" "${index[@]}" -r "$locked/torch-$stack.txt"
elif [ -n "${TORCH_SHA256:-}" ]; then
    echo "$torch --hash=sha256:$TORCH_SHA256" >"$venv/torch.txt"
    step "torch $build" "${hashed[@]}" "${index[@]}" -r "$venv/torch.txt"
else
    step "torch $build, unverified because TORCH_SHA256 is not set" "${pip[@]}" install --no-deps "${index[@]}" "$torch"
fi
step "libraries" "${hashed[@]}" -r $locked/common.txt -r $locked/dev.txt
step "torchrec, fbgemm, triton, deepspeed" "${hashed[@]}" -r "$locked/$stack.txt"
step "mme" "${pip[@]}" install --no-deps --no-build-isolation -e .
if [ "$stack" = cpu ]; then export DS_ACCELERATOR=cpu; fi
step "import check" "$venv/bin/python" -c 'import torch, fbgemm_gpu, torchrec, triton, deepspeed, mme, launcher, kernels'
say_foreign_kernels
echo "$wanted" >"$stamp"
echo "setup: done"
