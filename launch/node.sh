#!/usr/bin/env bash
# Train on the GPUs of this machine.
#
#   launch/node.sh PRESET --run DIR --data DIR [options of miro train]
#
# Edit: GPUS, to use fewer than all.
# One of several machines (launch/nodes.sh starts each with these variables): NNODES, NODE_RANK,
# MASTER_ADDR, MASTER_PORT.
set -euo pipefail
. "$(dirname "$0")/common.sh"
[ $# -gt 0 ] || usage
GPUS=${GPUS:-gpu}

meet=(--standalone)
if [ -n "${NNODES:-}" ]; then
    meet=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
# Triton's cache on a local disk: one process compiles the kernels for all.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/miro-triton-$UID}
run_ranks "${meet[@]}" --nproc-per-node "$GPUS" --module -- miro.cli train "$@"
