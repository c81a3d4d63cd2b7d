#!/usr/bin/env bash
# Makes the pinned environment .venv where it is missing or out of date, then hands over to dermgan.reproduce (Snakemake and papermill).
# ./reproduce.sh [options] | test [pytest options] | lab        DERMGAN_VENV=DIR uses an environment that is there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export OMP_WAIT_POLICY=PASSIVE   # threads that spin while waiting slow a shared machine tenfold
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824   # glibc keeps a step's memory for the next step

venv=${DERMGAN_VENV:-.venv}
if [ -z "${DERMGAN_VENV:-}" ]; then
    python=""
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then
        printf '%s\n' "No Python 3.11 or later with venv was found." "The environment is made with it." \
            "Install it (Debian: apt install python3-venv), then run ./reproduce.sh again." >&2
        exit 2
    fi
    stamp=$(cat pyproject.toml constraints.txt | cksum)
    if [ ! -x .venv/bin/python ] || [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
        echo "Making the environment in .venv (a few minutes, once)."
        "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
        echo "$stamp" > .venv/stamp
    fi
fi
export PATH="$(cd "$venv/bin" && pwd):$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

case "${1:-}" in
    test) shift; exec python -m pytest -n 2 --dist loadfile "$@" ;;   # -n 0: one after another
    lab)  shift; exec jupyter lab --notebook-dir nbs --ServerApp.tornado_settings='{"websocket_max_message_size": 67108864}' "$@" ;;
    *)    exec python -m dermgan.reproduce run "$@" ;;
esac
