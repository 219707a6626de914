#!/usr/bin/env bash
# Annotate, caption or encode with one process per GPU of this machine; each takes some of the shards.
#
#   launch/data.sh COMMAND SOURCE DEST [options of miro COMMAND]
#
# The processes do not communicate, so on several machines `srun miro COMMAND SOURCE DEST` also works.
# Edit: GPUS, to use fewer than all; DEVICE=cpu without GPUs.
set -euo pipefail
. "$(dirname "$0")/common.sh"
[ $# -gt 2 ] || usage
GPUS=${GPUS:-gpu}
DEVICE=${DEVICE:-cuda}

run exec torchrun --standalone --nproc-per-node "$GPUS" --module -- miro.cli "$@" --device "$DEVICE"
