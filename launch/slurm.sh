#!/usr/bin/env bash
# Train under SLURM, one task per GPU. A job that reaches its time limit, or that
# `scancel --signal=TERM` stops, saves and is queued again; one that `scancel` cancels is not.
#
#   sbatch launch/slurm.sh PRESET --run DIR --data DIR [options of miro train]
#
# Edit: the #SBATCH lines for your cluster (partition, account, GPUs per machine), and SETUP;
# MASTER_ADDR, the first machine's address for the others if that is not its name in SLURM.
#SBATCH --job-name=miro
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=miro-%j.log
set -euo pipefail
# sbatch runs a copy of this script from its spool folder: usage and run are not at hand.
if [ $# = 0 ]; then echo "usage: sbatch launch/slurm.sh PRESET --run DIR --data DIR" >&2; exit 2; fi
SETUP=${SETUP:-". .venv/bin/activate"}
[ -n "${DRY_RUN:-}" ] || eval "$SETUP"

nodes=${SLURM_JOB_NODELIST:-localhost}
first=$(scontrol show hostnames "$nodes" 2> /dev/null | head -n 1 || echo "$nodes")
MASTER_ADDR=${MASTER_ADDR:-$first}
MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
export MASTER_ADDR MASTER_PORT TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/miro-triton-$UID}

if [ -n "${DRY_RUN:-}" ]; then
    echo "MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT srun --wait=60 miro train $*"
    exit
fi
# A rank that stopped and saved creates this file, which is on this machine for rank 0.
MIRO_STOPPED_FILE=$(mktemp -u)
export MIRO_STOPPED_FILE
status=0
srun --wait=60 miro train "$@" || status=$?
# srun returns the highest status. 143: SIGTERM reached a rank that did not listen yet, and nothing is
# lost. If a rank fails, srun kills the others after 60 s: 137. (--kill-on-bad-exit would be 143.)
if [ -e "$MIRO_STOPPED_FILE" ] || [ "$status" = 143 ]; then status=75; fi
rm -f "$MIRO_STOPPED_FILE"
# A task of a job array may have the array's number: name the task, or all would be requeued.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# A cancelled job is still completing here, and `scontrol requeue` would bring it back.
if [ "$status" = 75 ] && scontrol show job "$job" | grep -q JobState=RUNNING; then
    scontrol requeue "$job"
fi
exit "$status"
