#!/usr/bin/env bash
# Run a regate command as a SLURM job of one or more nodes.
#
#   sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh train configs/digits.yaml run.out=runs/mine
#   LAUNCHER=deepspeed RANKS=8 sbatch --nodes 2 launch/slurm.sh teacher configs/digits.yaml
#
#   LAUNCHER     torchrun (default), deepspeed, or srun, with which SLURM starts every rank itself
#   RANKS        ranks of each node; default: the job's GPUs on it, or 1
#   LOGS         folder of the ranks' logs; default logs/<job>
#   MASTER_ADDR, MASTER_PORT   default: the job's first node, and a port from the job's number
#   PYTHON, REGATE_ENV         as in torchrun.sh
#
# Before the time limit, or at a pre-emption, the ranks save and end. The job then goes back into
# the queue and resumes from the checkpoint, because train gets run.resume=auto. A rank that fails
# ends the job with its exit code. Write further options of sbatch (account, partition, time) before
# the script.
#SBATCH --job-name=regate
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

fail() { echo "launch/slurm.sh: $1" >&2; exit 2; }

[[ -z ${REGATE_ENV:-} || -f $REGATE_ENV ]] ||
    fail "REGATE_ENV=$REGATE_ENV: no such file; name a file of settings, or unset it"
REGATE_ENV=${REGATE_ENV:-env.sh}
# shellcheck source=/dev/null
[[ ! -f $REGATE_ENV ]] || source "$REGATE_ENV"

[[ ${1:-} =~ ^(train|teacher|eval|doctor)$ ]] ||
    fail "usage: sbatch [OPTION ...] launch/slurm.sh train|teacher|eval|doctor [ARGUMENT ...]"
[[ -n ${SLURM_JOB_ID:-} ]] ||
    fail "SLURM_JOB_ID is not set: this is not inside a SLURM job; start it by sbatch"
arguments=("$@")
[[ $1 != train || " $* " == *" run.resume="* ]] || arguments+=(run.resume=auto)
export PYTHON=${PYTHON:-python}
"$PYTHON" -c 'import regate_ds' 2>/dev/null ||
    fail "PYTHON=$PYTHON cannot import regate_ds: activate its environment, or set PYTHON"
gpus=${SLURM_GPUS_ON_NODE:-0}
export RANKS=${RANKS:-$((gpus > 0 ? gpus : 1))}
export LOGS=${LOGS:-logs/$SLURM_JOB_ID}
{ mkdir -p "$LOGS" 2>/dev/null && [[ -w $LOGS ]]; } ||
    fail "LOGS=$LOGS: cannot be written; set LOGS to a folder that can be"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-$(head -n 1 <<<"$nodes")}
export MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}

# This runs on each node, or as each rank, and writes down a code that is not 0. srun alone would
# return the highest code, which is that of a rank that was killed because another rank had failed.
# shellcheck disable=SC2016
around='trap : TERM; trap "" USR1; eval "$0"; code=$?
    ((code == 0)) || echo "$code" >>"$FAILED"; exit "$code"'
export FAILED=$LOGS/failed
: >"$FAILED"
# shellcheck disable=SC2016
case ${LAUNCHER:=torchrun} in
torchrun)
    options=(--ntasks-per-node=1)
    program='"$PYTHON" -m regate_ds.job.torchrun \
        --nnodes "$SLURM_JOB_NUM_NODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$RANKS" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --shutdown_timeout 300 \
        --log_dir "$LOGS/node$SLURM_NODEID" --tee 3 -m regate_ds.cli "$@"'
    ;;
deepspeed)
    options=(--ntasks-per-node=1)
    while read -r node; do echo "$node slots=$RANKS"; done <<<"$nodes" >"$LOGS/hostfile"
    program='"$PYTHON" -m deepspeed.launcher.runner \
        --hostfile "$LOGS/hostfile" --no_ssh --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        --no_local_rank --enable_each_rank_log "$LOGS" --module regate_ds.cli "$@"'
    ;;
srun)
    options=(--ntasks-per-node="$RANKS" --output "$LOGS/rank%t.log" --open-mode=append)
    program='"$PYTHON" -u -m regate_ds.cli "$@"'
    ;;
*) fail "LAUNCHER=$LAUNCHER: must be torchrun, deepspeed or srun" ;;
esac

printf 'launch/slurm.sh: job %s, start %s, on %s, %s ranks each, by %s: regate' "$SLURM_JOB_ID" \
    "$((${SLURM_RESTART_COUNT:-0} + 1))" "$SLURM_JOB_NODELIST" "$RANKS" "$LAUNCHER" >&2
printf ' %q' "${arguments[@]}" >&2
echo >&2

# Send USR1 to the processes of all steps, not to this script. The launchers ignore it; the ranks
# take it as a request to save and end.
asked=
trap 'asked=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
# Ignore TERM here: a pre-emption sends it to the steps as well.
trap : TERM
# --kill-on-bad-exit: a rank that fails must not leave the others waiting for it.
srun --kill-on-bad-exit=1 "${options[@]}" bash -c "$around" "$program" "${arguments[@]}" &
step=$! code=0
# A trapped signal ends `wait`, but not the step.
while :; do
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || break
done
[[ ! -s $FAILED ]] || code=$(head -n 1 "$FAILED")
# 75: the ranks have saved; 143: torchrun's code where the ranks were sent SIGTERM. SLURM itself
# requeues no job that ends in the grace time of a pre-emption. A cancelled job is not RUNNING.
[[ $code -ne 75 && $code -ne 143 ]] || asked=1
if [[ -n $asked && $code -ne 0 && $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
    echo "launch/slurm.sh: job $SLURM_JOB_ID goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
[[ $code -eq 0 || $LAUNCHER == torchrun ]] || grep -rhs '^regate ' "$LOGS" >&2 || true
exit "$code"
