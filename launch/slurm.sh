#!/usr/bin/env bash
# Trains on GPU nodes under Slurm, from a clone of this repository in a folder that all nodes see:
#
#     sbatch --nodes=4 launch/slurm.sh --config=... --workdir=...      the flags are those of train.py
#
# The lines below are for nodes of 8 GPUs; flags of sbatch take their place. In the environment:
#
#   VENV   environment with the packages, on all nodes (default: .venv of the clone)
#
# --ntasks-per-node   a process for each GPU: the same number as in the next line
# --gpus-per-node     GPUs of a node; all are seen by all processes, and each takes its own
# --cpus-per-task     cores of a node divided by its GPUs
# --time              longest time that the partition allows; the run goes on with the next job
# --signal            SIGTERM 300 s before that: time for the step under way and the last checkpoint
# --requeue           where a node fails, Slurm starts the job again, and the run goes on
# --dependency        one job of this name at a time: two that wait in line follow each other
#SBATCH --job-name=mlra
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this file, in the folder from which the job was submitted.
if [[ ! -f train.py ]]; then
    echo "launch/slurm.sh: $PWD has no train.py; submit from the clone" >&2
    exit 2
fi
# Where one process ends badly srun ends the others, and all start again.
exec launch/again.sh srun --kill-on-bad-exit=1 "${VENV:-$PWD/.venv}/bin/python" train.py "$@"
