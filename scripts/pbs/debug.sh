#!/bin/bash -l
# One rank on one GPU for a quarter of an hour: does a training start at all?
#   qsub scripts/pbs/debug.sh
# typed where allranks is checked out. Change the #PBS lines to what your centre asks for; on Polaris also
##PBS -A PROJECT -q debug -l filesystems=home:eagle -l place=scatter
# with one # less. `allranks submit` writes such a script itself, from a file about the machine.
#PBS -N allranks-debug
#PBS -l select=1:ncpus=8:mpiprocs=1:ngpus=1
#PBS -l walltime=00:15:00
#PBS -j oe
#PBS -k doe

training=(model=cnn trainer.epochs=1)   # overrides: `allranks train --help` lists them
run=runs/debug   # submitted again, the training goes on there until it is finished

umask 022
export ALLRANKS_DEADLINE=$(($(date +%s) + 870))   # the walltime in seconds, less 30 for this script
cd "$PBS_O_WORKDIR" || exit 1
# The environment that allranks is installed in; module load lines, where your centre has such, come first.
# shellcheck source=/dev/null
. .venv/bin/activate

exec allranks launch "${training[@]}" run.dir="$run"
