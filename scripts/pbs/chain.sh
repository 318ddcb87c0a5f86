#!/bin/bash -l
# A training longer than a job may be: each job queues its successor, which goes on in the same run.
#   qsub scripts/pbs/chain.sh
# typed where allranks is checked out. Change the #PBS lines to what your centre asks for; on Polaris also
##PBS -A PROJECT -q debug -l filesystems=home:eagle -l place=scatter
# with one # less. `allranks submit` writes such a script itself, from a file about the machine.
#PBS -N allranks-chain
#PBS -l select=1:ncpus=32:mpiprocs=4:ngpus=4
#PBS -l walltime=01:00:00
#PBS -j oe
#PBS -k doe

training=(model=cnn)   # overrides: `allranks train --help` lists them
run=runs/chain         # another name for another chain
links=3                # jobs in all

umask 022
export ALLRANKS_DEADLINE=$(($(date +%s) + 3570))   # the walltime in seconds, less 30 for this script
cd "$PBS_O_WORKDIR" || exit 1
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
mark=$run.after-$PBS_JOBID   # one successor, even where this job is started twice
if [ "$link" -lt "$links" ] && mkdir -p "$(dirname "$run")" && mkdir "$mark" 2> /dev/null; then
  # Where qsub is not allowed on compute nodes: `allranks submit --chain` queues them all at the start.
  qsub -W depend=afterany:"$PBS_JOBID" -v LINK=$((link + 1)),REACHED="$reached" scripts/pbs/chain.sh
fi
exec allranks launch "${training[@]}" run.dir="$run"
