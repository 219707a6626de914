#!/usr/bin/env bash
# Train on the GPUs of this machine.
#
#   launch/node.sh PRESET --run DIR --data DIR [options of miro train]
#
# Edit: GPUS, if not all of them are to be used.
set -euo pipefail
. "$(dirname "$0")/dry_run.sh"
GPUS=${GPUS:-gpu}

# A disk of this machine: kernels are compiled into it once, before the processes meet.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/miro-triton-$UID}
run exec torchrun --standalone --nproc-per-node "$GPUS" --module -- miro.cli train "$@"
