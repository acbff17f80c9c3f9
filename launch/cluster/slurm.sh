#!/usr/bin/env bash
# Starts one process per GPU on Slurm. JAX reads the rest from Slurm's variables.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/cluster/slurm.sh \
#       --config=configs/bridge_video.py --workdir=/shared/runs/bridge
#
# Submit from the repository. --workdir and the data must be on a disk that all nodes share. Slurm
# sends SIGTERM 10 minutes before the time limit and before a preemption. The run then saves its
# step, and the same command continues it. Ask for GPUs per node, not per task: JAX gives every
# process of a node its own GPU.
#SBATCH --job-name=mvjax
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
#SBATCH --output=mvjax-%j.log

set -euo pipefail
# If one process dies, srun ends the others. It does not take the CPUs of a task from sbatch (since
# Slurm 22.05), and one CPU could not feed a GPU.
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${PYTHON:-.venv/bin/python}" -m "${MODULE:-launch.train}" "$@"
