#!/usr/bin/env bash
# Train under SLURM, one task per GPU. A job that reaches its time limit saves and is requeued.
#
#   sbatch launch/slurm.sh PRESET --run DIR --data DIR [options of miro train]
#
# Edit: the #SBATCH lines for your cluster (partition, account, GPUs per machine), and SETUP.
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
SETUP=${SETUP:-". .venv/bin/activate"}
[ -n "${DRY_RUN:-}" ] || eval "$SETUP"

nodes=${SLURM_JOB_NODELIST:-localhost}
MASTER_ADDR=$(scontrol show hostnames "$nodes" 2> /dev/null | head -n 1 || echo "$nodes")
MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
export MASTER_ADDR MASTER_PORT TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/miro-triton-$UID}

if [ -n "${DRY_RUN:-}" ]; then
    echo "MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT srun --kill-on-bad-exit miro train $*"
    exit
fi
status=0
srun --kill-on-bad-exit miro train "$@" || status=$?
# Exit status 75: SIGTERM was received and a checkpoint was saved.
if [ "$status" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
