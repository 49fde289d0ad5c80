#!/usr/bin/env bash
# Checks and measures glm_peft on a GPU, in less than nine minutes: one table, and its numbers as JSON in $OUT.
#   scripts/gpu_check.sh             on a machine with a GPU
#   scripts/gpu_check.sh --small     every line of it at a small size, on any machine
# What the machine lacks and cannot fetch is installed from wheels in $WHEELS, by default the folder wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} wheels=${WHEELS:-wheels} site=
if [ -d "$wheels" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="${site:+$site:}.:scripts${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$python" scripts/gpu_check.py --output_dir "${OUT:-output/gpu_check}" "$@"
