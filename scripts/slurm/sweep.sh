#!/bin/bash
# An array: a learning rate for each job, all below one directory.
#   sbatch scripts/slurm/sweep.sh
# typed where allranks is checked out. Change the #SBATCH lines to what your centre asks for; at NERSC also
##SBATCH -A PROJECT -q debug -C gpu
# with one # less. `allranks submit` writes such a script itself, from a file about the machine.
#SBATCH --job-name=allranks-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=01:00:00
#SBATCH --output=%x-%A-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-2

training=(model=cnn)   # overrides: `allranks train --help` lists them
rates=(0.1 0.03 0.01)   # as many as the array has jobs
most=20   # times that a job is queued again to go on

umask 022
# Slurm hands on what was left over in the shell that submitted.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export ALLRANKS_DEADLINE=$(($(date +%s) + 3570))   # --time in seconds, less 30 for this script
cd "$SLURM_SUBMIT_DIR" || exit 1
# The environment that allranks is installed in; module load lines, where your centre has such, come first.
# shellcheck source=/dev/null
. .venv/bin/activate

run=runs/sweep-$SLURM_ARRAY_JOB_ID/$SLURM_ARRAY_TASK_ID
allranks launch "${training[@]}" optimizer.lr="${rates[SLURM_ARRAY_TASK_ID]}" run.dir="$run"
code=$?
if [ "$code" = 85 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$most" ]; then   # stopped before the end of --time
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
