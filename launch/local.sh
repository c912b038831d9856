#!/usr/bin/env bash
# Run a regate command with several data-parallel ranks on this node, by the deepspeed launcher.
#
#   launch/local.sh 2 train configs/digits.yaml run.out=runs/first
#
# It works from any directory, and passes arguments and the exit code through.
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 RANKS COMMAND [ARGUMENT ...]" >&2
    exit 2
fi
exec python -m regate_ds.job.deepspeed_launcher "$@"
