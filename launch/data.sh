#!/usr/bin/env bash
# Annotate, caption or encode on the GPUs of this machine, each of which has its share of the shards.
#
#   launch/data.sh COMMAND SOURCE DEST [options of miro COMMAND]
#
# The processes never meet, so on several machines `srun miro COMMAND SOURCE DEST` does the same.
# Edit: GPUS, if not all of them are to be used; DEVICE=cpu where there are none.
set -euo pipefail
. "$(dirname "$0")/dry_run.sh"
GPUS=${GPUS:-gpu}
DEVICE=${DEVICE:-cuda}

run exec torchrun --standalone --nproc-per-node "$GPUS" --module -- miro.cli "$@" --device "$DEVICE"
