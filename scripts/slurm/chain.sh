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

training=(model=cnn)   # overrides: `allranks train --help` lists them
run=runs/chain         # another name for another chain
links=3                # jobs in all

umask 022
# Slurm hands on what was left over in the shell that submitted.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export ALLRANKS_DEADLINE=$(($(date +%s) + 3600))   # --time in seconds: Slurm before 23.02 does not tell it
cd "$SLURM_SUBMIT_DIR" || exit 1
# The environment that allranks is installed in; module load lines, where your centre has such, come first.
# shellcheck source=/dev/null
. .venv/bin/activate

link=${LINK:-1}
if grep -qs '"state": "finished"' "$run/summary.json"; then
  echo "$run is finished: nothing is left to do"
  exit 0
fi
if [ "$link" -lt "$links" ]; then
  sbatch --dependency=afterany:"$SLURM_JOB_ID" --kill-on-invalid-dep=yes --export=ALL,LINK=$((link + 1)) \
    scripts/slurm/chain.sh
fi
if [ -e "$run/config.yaml" ]; then
  exec allranks launch --run "$run"
fi
exec allranks launch "${training[@]}" run.dir="$run"
