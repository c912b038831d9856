#!/usr/bin/env bash
# Run a regate command by the deepspeed launcher on the nodes of a hostfile.
#
#   launch/deepspeed.sh hostfile train configs/digits.yaml run.out=runs/mine
#   NODE_RANK=1 launch/deepspeed.sh hostfile teacher configs/digits.yaml
#
# The first form reaches every node over ssh, by pdsh. With NODE_RANK set it uses no ssh (--no_ssh):
# start it once on each node, numbered like the lines of the hostfile. A hostfile (DeepSpeed's word)
# has a line for each node, such as "node0 slots=8". All nodes must see the same folder and Python.
#
#   MASTER_ADDR, MASTER_PORT   where the first rank listens; default: the first node, 29500
#   LOGS                       folder of the ranks' logs; default logs/<start time>
#   FORWARD                    pattern of the variables that go to the other nodes
#   DS_OPTIONS                 further options of deepspeed, such as "--ssh_port 2222"
#   PYTHON, REGATE_ENV         as in torchrun.sh
#
# It works from any directory, and passes arguments and the exit code through. The output of the
# ranks is in their logs; this script prints only the lines that say why a rank failed.
set -euo pipefail

fail() { echo "$0: $1" >&2; exit 2; }

[[ -z ${REGATE_ENV:-} || -f $REGATE_ENV ]] ||
    fail "REGATE_ENV=$REGATE_ENV: no such file; name a file of settings, or unset it"
REGATE_ENV=${REGATE_ENV:-env.sh}
# shellcheck source=/dev/null
[[ ! -f $REGATE_ENV ]] || source "$REGATE_ENV"

[[ $# -ge 2 && $2 =~ ^(train|teacher|eval|doctor)$ ]] ||
    fail "usage: [NODE_RANK=N] $0 HOSTFILE train|teacher|eval|doctor [ARGUMENT ...]"
hostfile=$1
shift
line_form="write a line 'NODE slots=N' for each node"
[[ -f $hostfile ]] || fail "$hostfile: no such hostfile; $line_form"
python=$(command -v "${PYTHON:-python}") ||
    fail "PYTHON=${PYTHON:-python}: no such program; set PYTHON to the path of one"
"$python" -c 'import regate_ds' 2>/dev/null ||
    fail "PYTHON=$python cannot import regate_ds: activate its environment, or set PYTHON"
# Refuse lines at which deepspeed would end in a traceback, or wait.
mapfile -t lines < <(sed 's/#.*//' "$hostfile" | grep '[^[:space:]]')
((${#lines[@]})) || fail "$hostfile names no node; $line_form"
for line in "${lines[@]}"; do
    [[ $line =~ ^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$ ]] ||
        fail "$hostfile: '${line//[[:cntrl:]]/?}' is not 'NODE slots=N'; $line_form"
done
twice=$(printf '%s\n' "${lines[@]}" | awk '{ sub(/^.*@/, "", $1) } seen[$1]++ { print $1; exit }')
[[ -z $twice ]] || fail "$hostfile names $twice twice: give it one line, with all its slots"
for line in "${lines[@]}"; do
    read -r node _ <<<"$line"
    [[ $node != *:* ]] ||
        fail "$hostfile: '$node' names a port; write '${node%:*}', and set DS_OPTIONS='--ssh_port ${node##*:}'"
done
read -r first _ <<<"${lines[0]}"
# me@node tells ssh who logs in; the ranks look for the node itself.
first=${first##*@}
if [[ -n ${NODE_RANK:-} ]]; then
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ && $NODE_RANK -lt ${#lines[@]} ]] ||
        fail "NODE_RANK=$NODE_RANK: number the ${#lines[@]} nodes of $hostfile from 0"
fi

# All nodes read and write the same folder.
logs=$(realpath -m "${LOGS:-logs/$(date +%Y%m%d-%H%M%S)}")
{ mkdir -p "$logs" 2>/dev/null && [[ -w $logs ]]; } ||
    fail "LOGS=$logs: cannot be written; set LOGS to a folder that can be"
regate=(regate_ds.cli "$@")
if [[ -n ${NODE_RANK:-} ]]; then
    place=(--no_ssh --node_rank "$NODE_RANK")
else
    command -v pdsh >/dev/null || fail "pdsh is not installed: install it, or set NODE_RANK"
    # pdsh passes no variables on; deepspeed exports those in this file.
    forward=${FORWARD:-^(NCCL|GLOO|OMP|MKL|HF|TOKENIZERS|TORCH|TRITON|PYTORCH|CUDA|DS|DEEPSPEED)_}
    export DS_ENV_FILE=$logs/environment
    # The nodes' shells read what stands there. Around a value that is not plain deepspeed puts double
    # quotes; those here end them, so that it is quoted for the shell alone. pdsh replaces %h.
    for name in $(compgen -e | grep -E "$forward" | grep -v '^DS_ENV_FILE$'); do
        value=${!name}
        if [[ ! $value =~ ^[A-Za-z0-9_@+=:,./-]*$ ]]; then
            printf -v value %q "$value"
            percent="\$'\x25'"
            [[ $value != \$\'* ]] || percent='\x25'
            value="\"${value//%/"$percent"}\""
        fi
        printf '%s=%s\n' "$name" "$value"
    done >"$DS_ENV_FILE"
    for path in "$logs" "$PWD" "$python"; do
        [[ $path =~ ^[A-Za-z0-9_./+@:,=-]*$ ]] ||
            fail "$path: deepspeed passes it to the nodes' shells unquoted; use a path without spaces and signs"
    done
    place=(--launcher pdsh)
    # Through pdsh, words would be split and expanded by the nodes' shells.
    printf '%s\0' "$@" >"$logs/arguments"
    regate=(regate_ds.cli --arguments-file "$logs/arguments")
    told=" (the file holds:$(printf ' %q' "$@"))"
fi
read -ra more <<<"${DS_OPTIONS:-}"
command=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" "${place[@]}"
    --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}"
    --no_local_rank --enable_each_rank_log "$logs" ${more[@]+"${more[@]}"}
    --module "${regate[@]}")
printf '%s: on %s:' "$0" "$(hostname)" >&2
printf ' %q' "${command[@]}" >&2
echo "${told:-}" >&2
# deepspeed ignores USR1; the ranks take it as a request to save and end.
trap '' USR1
code=0
"${command[@]}" || code=$?
if ((code != 0)); then
    grep -hs '^regate ' "$logs"/*_rank*.log >&2 || true
    echo "$0: exit code $code; what the ranks printed is in $logs" >&2
fi
exit "$code"
