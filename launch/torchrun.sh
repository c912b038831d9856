#!/usr/bin/env bash
# Run a regate command by torchrun on this node, or on several nodes: start it once on each.
#
#   RANKS=8 launch/torchrun.sh train configs/digits.yaml run.out=runs/mine
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 RANKS=8 launch/torchrun.sh teacher configs/digits.yaml
#
#   RANKS        ranks of each node; default: its GPUs, or 1
#   NNODES       nodes; default 1. Several need NODE_RANK, MASTER_ADDR and one MASTER_PORT (29500)
#   LOGS         folder of the ranks' logs, which the console gets too; default logs/<start time>
#   GRACE        seconds that ranks get after SIGTERM, to save; default 300
#   PYTHON       default: the first python on PATH
#   REGATE_ENV   file of settings that is read first; default: env.sh in this folder, if it exists
#
# It works from any directory, and passes arguments and the exit code through.
set -euo pipefail

fail() { echo "$0: $1" >&2; exit 2; }

[[ -z ${REGATE_ENV:-} || -f $REGATE_ENV ]] ||
    fail "REGATE_ENV=$REGATE_ENV: no such file; name a file of settings, or unset it"
REGATE_ENV=${REGATE_ENV:-env.sh}
# shellcheck source=/dev/null
[[ ! -f $REGATE_ENV ]] || source "$REGATE_ENV"

[[ ${1:-} =~ ^(train|teacher|eval|doctor)$ ]] ||
    fail "usage: [RANKS=N] $0 train|teacher|eval|doctor [ARGUMENT ...]"
python=${PYTHON:-python}
"$python" -c 'import regate_ds' 2>/dev/null ||
    fail "PYTHON=$python cannot import regate_ds: activate its environment, or set PYTHON"
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))} nodes=${NNODES:-1}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "RANKS=$ranks: must be a whole number above 0"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$nodes: must be a whole number above 0"

if ((nodes > 1)); then
    [[ -n ${NODE_RANK:-} ]] || fail "NNODES=$nodes, but NODE_RANK is not set: number the nodes from 0"
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes, but MASTER_ADDR is not set: name node 0"
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ && $NODE_RANK -lt $nodes ]] ||
        fail "NODE_RANK=$NODE_RANK: number the $nodes nodes from 0"
    place=(--nnodes "$nodes" --node_rank "$NODE_RANK"
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
else
    place=(--standalone)
fi
[[ ${MASTER_PORT:-29500} =~ ^[0-9]+$ ]] || fail "MASTER_PORT=$MASTER_PORT: must be a whole number"
logs=${LOGS:-logs/$(date +%Y%m%d-%H%M%S)}
{ mkdir -p "$logs" 2>/dev/null && [[ -w $logs ]]; } ||
    fail "LOGS=$logs: cannot be written; set LOGS to a folder that can be"
command=("$python" -m regate_ds.job.torchrun "${place[@]}" --nproc_per_node "$ranks"
    --shutdown_timeout "${GRACE:-300}" --log_dir "$logs" --tee 3 -m regate_ds.cli "$@")
printf '%s: on %s:' "$0" "$(hostname)" >&2
printf ' %q' "${command[@]}" >&2
echo >&2
# torchrun ignores USR1; the ranks take it as a request to save and end.
trap '' USR1
exec "${command[@]}"
