#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under 9 minutes, without network: the gpu tests, the default
# command, and training steps of two real model shapes. Results go to one JSON; see scripts/gpu_check.py for options.
# What the machine's Python lacks is installed from wheels/ (scripts/gpu_wheels.py), into a temporary folder.
# Usage: scripts/gpu_check.sh [--json FILE] [--cpu-dry-run]
set -euo pipefail
cd "$(dirname "$0")/.."
target="$(mktemp -d)"
trap 'rm -rf "$target"' EXIT

if compgen -G "wheels/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$target" wheels/*.whl ||
        echo "the wheels could not be installed; going on with what is here" >&2
fi
export PYTHONPATH="$target:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
python3 scripts/gpu_check.py "$@"
