#!/usr/bin/env bash
# Train on several machines that have ssh to each other and share the run's folder and this one.
#
#   launch/nodes.sh HOSTFILE PRESET --run DIR --data DIR [options of miro train]
#
# HOSTFILE has one line per machine, in DeepSpeed's format: HOST slots=GPUS.
# SIGTERM, SIGHUP and Ctrl-C stop the run on all machines; the exit status is 75 once it has saved.
# Edit: PORT, a free port of the first machine; MASTER_ADDR, its address for the others if that is not
# HOST; SETUP, commands before `miro` in each machine's shell, such as the network interfaces of NCCL:
# export NCCL_SOCKET_IFNAME=... NCCL_IB_HCA=...
set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)
. "$launch/common.sh"
[ $# -gt 1 ] || usage
PORT=${PORT:-29500}
SETUP=${SETUP:-"cd $(printf %q "$PWD") && . .venv/bin/activate"}
SSH=${SSH:-ssh -o BatchMode=yes}

hostfile=$1
shift
hosts=() slots=()
while read -r host slot rest; do
    if [[ ! $slot =~ ^slots=([1-9][0-9]*)$ || -n $rest ]]; then
        echo "$hostfile: '$host $slot $rest': each line must be HOST slots=GPUS" >&2 && exit 2
    elif [[ " ${hosts[*]} " == *" $host "* ]]; then
        echo "$hostfile: $host is there twice; give all its GPUs in one line" >&2 && exit 2
    fi
    hosts+=("$host") slots+=("${BASH_REMATCH[1]}")
done < <(sed 's/#.*//; s/\r$//' "$hostfile" | awk NF)
[ ${#hosts[@]} -gt 0 ] || { echo "$hostfile: has no line HOST slots=GPUS" >&2 && exit 2; }
MASTER_ADDR=${MASTER_ADDR:-${hosts[0]#*@}} # USER@HOST is for ssh only.

# What node.sh of each machine reads from its standard input, which ssh carries.
tell() { for input in "${inputs[@]}"; do echo "$1" >&"$input"; done; }

inputs=()
for node in "${!hosts[@]}"; do
    command="$SETUP && $(printf '%q ' env MIRO_COMMANDS=stdin \
        NNODES="${#hosts[@]}" NODE_RANK="$node" GPUS="${slots[node]}" \
        MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$PORT" "$launch/node.sh" "$@")"
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$SSH ${hosts[node]} $command"
        continue
    fi
    exec {input}<> <(:) # An anonymous pipe.
    inputs+=("$input")
    $SSH "${hosts[node]}" "$command" <&"$input" &
done
[ -z "${DRY_RUN:-}" ] || exit 0
trap 'signalled=1; tell stop' TERM HUP INT

result=0 running=${#hosts[@]}
while [ "$running" -gt 0 ] && [ -n "$(jobs -p)" ]; do
    status=0 signalled=
    wait -n || status=$?
    [ -z "$signalled" ] || continue # The trap ended `wait`, not a machine.
    running=$((running - 1))
    # If one machine fails, end the others, which would wait for the collectives' time-out.
    if [ "$result" = 0 ] && [ "$status" != 0 ] && [ "$status" != 75 ]; then tell kill; fi
    [ "$result" != 0 ] || result=$status
done
exit "$result"
