#!/usr/bin/env bash
# One model over all GPUs of this machine (over four CPU stages without one), straight from the full checkpoint.
# Edit the next line, or set any of these in the environment. Arguments go to `stagewire up` (see --help).
FULL_MODEL_PATH="${FULL_MODEL_PATH:-/path/to/Llama-3-8B}"  # Change this line
NUM_STAGES="${NUM_STAGES:-auto}"                           # auto: the number of GPUs, else 4
API_PORT="${API_PORT:-8000}"
LOG_DIR="${LOG_DIR:-zeromq_pp_full_model_logs}"            # below the current directory

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

if [[ "$FULL_MODEL_PATH" == /path/to/* ]]; then
    echo "run_from_full_model.sh: FULL_MODEL_PATH is still $FULL_MODEL_PATH: edit that line at the top of" \
        "${BASH_SOURCE[0]}, or set FULL_MODEL_PATH in the environment" >&2
    exit 2
fi

for stagewire in "$root/.venv/bin/stagewire" "${VIRTUAL_ENV:-/nonexistent}/bin/stagewire" "$(command -v stagewire || true)"; do
    [[ -x "$stagewire" ]] && break
done
if [[ ! -x "$stagewire" ]]; then
    echo "run_from_full_model.sh: no stagewire in $root/.venv, in an active virtual environment, or on PATH:" \
        "run $root/scripts/setup" >&2
    exit 2
fi

exec "$stagewire" up --model "$FULL_MODEL_PATH" --num-stages "$NUM_STAGES" --port "$API_PORT" --log-dir "$LOG_DIR" "$@"
