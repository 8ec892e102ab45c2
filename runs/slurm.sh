#!/usr/bin/env bash
# A run over several nodes of a Slurm cluster, one task for each GPU, submitted from the repository's root:
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 runs/slurm.sh config=FILE.yaml key=value ...
# Ahead of the time limit Slurm sends SIGTERM; the run then saves, ends with code 143, and the job is queued again.
#SBATCH --job-name=dmd_dar
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_%j.log
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
[[ -d .venv ]] && source .venv/bin/activate
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
code=0
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python distill.py "$@"' distill "$@" || code=$?
if [[ $code == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
