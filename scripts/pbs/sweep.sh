#!/bin/bash -l
# An array: a learning rate for each job, all below one directory.
#   qsub scripts/pbs/sweep.sh
# typed where allranks is checked out. Change the #PBS lines to what your centre asks for; on Polaris also
##PBS -A PROJECT -q debug -l filesystems=home:eagle -l place=scatter
# with one # less. `allranks submit` writes such a script itself, from a file about the machine.
#PBS -N allranks-sweep
#PBS -l select=1:ncpus=32:mpiprocs=4:ngpus=4
#PBS -l walltime=01:00:00
#PBS -j oe
#PBS -k doe
#PBS -J 0-2
#PBS -r y

training=(model=cnn)   # overrides: `allranks train --help` lists them
rates=(0.1 0.03 0.01)   # as many as the array has jobs

umask 022
export ALLRANKS_DEADLINE=$(($(date +%s) + 3570))   # the walltime in seconds, less 30 for this script
cd "$PBS_O_WORKDIR" || exit 1
# The environment that allranks is installed in; module load lines, where your centre has such, come first.
# shellcheck source=/dev/null
. .venv/bin/activate

run=runs/sweep-${PBS_ARRAY_ID%%[*}/$PBS_ARRAY_INDEX
exec allranks launch "${training[@]}" optimizer.lr="${rates[PBS_ARRAY_INDEX]}" run.dir="$run"
