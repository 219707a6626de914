#!/usr/bin/env bash
# Train on the GPUs of this machine.
#
#   launch/node.sh PRESET --run DIR --data DIR [options of miro train]
#
# Edit: GPUS, to use fewer than all.
set -euo pipefail
. "$(dirname "$0")/dry_run.sh"
GPUS=${GPUS:-gpu}

# Triton's cache on a local disk: one process compiles the kernels for all.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/miro-triton-$UID}
run exec torchrun --standalone --nproc-per-node "$GPUS" --module -- miro.cli train "$@"
