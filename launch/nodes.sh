#!/usr/bin/env bash
# Train on the GPUs of many machines that reach one another by ssh and share the run's folder.
#
#   launch/nodes.sh HOSTFILE PRESET --run DIR --data DIR [options of miro train]
#
# HOSTFILE has a line a machine, as DeepSpeed's: HOST slots=GPUS. The first one is where all meet.
# Edit: PORT, one that is free there; SETUP, what a shell of those machines needs before `miro`;
# and, in SETUP, the network of the collectives: NCCL_SOCKET_IFNAME, NCCL_IB_HCA.
set -euo pipefail
PORT=${PORT:-29500}
SETUP=${SETUP:-"cd $(printf %q "$PWD") && . .venv/bin/activate"}
# With -tt the end of the ssh is the end of what it started.
SSH=${SSH:-ssh -tt -o BatchMode=yes}

hostfile=$1
shift
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF {split($2, s, "="); print $1, s[2]}')
read -r first _ <<< "${hosts[0]}"
# One machine's end ends the others, so that none waits for it until the time-out.
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
trap 'exit 75' TERM
for node in "${!hosts[@]}"; do
    read -r host slots <<< "${hosts[$node]}"
    command="$SETUP && TRITON_CACHE_DIR=/tmp/miro-triton-\$UID $(printf '%q ' torchrun \
        --nnodes "${#hosts[@]}" --node-rank "$node" --nproc-per-node "$slots" \
        --master-addr "$first" --master-port "$PORT" --module -- miro.cli train "$@")"
    if [ -n "${DRY_RUN:-}" ]; then echo "$SSH $host $command"; else $SSH "$host" "$command" & fi
done
if [ -n "${DRY_RUN:-}" ]; then trap - EXIT; exit; fi
for _ in "${hosts[@]}"; do wait -n; done
