#!/usr/bin/env bash
# Train on several machines that have ssh to each other and share the run's folder.
#
#   launch/nodes.sh HOSTFILE PRESET --run DIR --data DIR [options of miro train]
#
# HOSTFILE has one line per machine, in DeepSpeed's format: HOST slots=GPUS. The first is MASTER_ADDR.
# Edit: PORT, a free port of the first machine; SETUP, commands before `miro` in each machine's shell,
# such as the network interfaces of NCCL: export NCCL_SOCKET_IFNAME=... NCCL_IB_HCA=...
set -euo pipefail
PORT=${PORT:-29500}
SETUP=${SETUP:-"cd $(printf %q "$PWD") && . .venv/bin/activate"}
# -tt: ending ssh also ends the remote command.
SSH=${SSH:-ssh -tt -o BatchMode=yes}

hostfile=$1
shift
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF {split($2, s, "="); print $1, s[2]}')
read -r first _ <<< "${hosts[0]}"
# If one machine fails, end the others, which would wait for the collectives' time-out.
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
