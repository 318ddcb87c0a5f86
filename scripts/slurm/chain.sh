#!/bin/bash
# A training longer than a job may be: each job queues its successor, which goes on in the same run.
#   sbatch scripts/slurm/chain.sh
# typed where allranks is checked out. Change the #SBATCH lines to what your centre asks for; at NERSC also
##SBATCH -A PROJECT -q debug -C gpu
# with one # less. `allranks submit` writes such a script itself, from a file about the machine.
#SBATCH --job-name=allranks-chain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

training=(model=cnn)   # overrides: `allranks train --help` lists them
run=runs/chain         # another name for another chain
links=3                # jobs in all

umask 022
# Slurm hands on what was left over in the shell that submitted.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export ALLRANKS_DEADLINE=$(($(date +%s) + 3570))   # --time in seconds, less 30 for this script
cd "$SLURM_SUBMIT_DIR" || exit 1
# The environment that allranks is installed in; module load lines, where your centre has such, come first.
# shellcheck source=/dev/null
. .venv/bin/activate

link=${LINK:-1}
if grep -qs '"state": "finished"' "$run/summary.json"; then
  echo "$run is finished: nothing is left to do"
  exit 0
fi
newest=$(find "$run/checkpoints" -name 'step-*' 2> /dev/null | sort -V | tail -n 1)
# A job may have had time for the evaluation of an epoch only: then the step is the same, with an epoch more.
epochs=$(grep -o '"epoch":[0-9]*' "$newest/state.json" 2> /dev/null | head -n 1 | tr -dc 0-9)
reached=$newest:$epochs
if [ "$link" -gt 1 ] && [ "$reached" = "${REACHED:-}" ]; then
  echo "the job before this one has not gained a step: the chain ends here"
  exit 86
fi
mark=$run.after-$SLURM_JOB_ID   # one successor, even where this job is started twice
if [ "$link" -lt "$links" ] && mkdir -p "$(dirname "$run")" && mkdir "$mark" 2> /dev/null; then
  export LINK=$((link + 1)) REACHED=$reached
  sbatch --dependency=afterany:"$SLURM_JOB_ID" --kill-on-invalid-dep=yes scripts/slurm/chain.sh
fi
exec allranks launch "${training[@]}" run.dir="$run"
