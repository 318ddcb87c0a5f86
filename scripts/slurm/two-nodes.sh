#!/bin/bash
# Two nodes with a rank on each of four GPUs.
#   sbatch scripts/slurm/two-nodes.sh
# typed where allranks is checked out. Change the #SBATCH lines to what your centre asks for; at NERSC also
##SBATCH -A PROJECT -q debug -C gpu
# with one # less. `allranks submit` writes such a script itself, from a file about the machine.
#SBATCH --job-name=allranks-two-nodes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

training=(model=cnn)   # overrides: `allranks train --help` lists them
most=20   # times that the job is queued again to go on

umask 022
# Slurm hands on what was left over in the shell that submitted.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export ALLRANKS_DEADLINE=$(($(date +%s) + 3570))   # --time in seconds, less 30 for this script
cd "$SLURM_SUBMIT_DIR" || exit 1
# The environment that allranks is installed in; module load lines, where your centre has such, come first.
# shellcheck source=/dev/null
. .venv/bin/activate

run=runs/two-nodes-$SLURM_JOB_ID   # the same after a requeue, so that the training goes on
allranks launch --nodes 2 "${training[@]}" run.dir="$run"
code=$?
if [ "$code" = 85 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$most" ]; then   # stopped before the end of --time
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
