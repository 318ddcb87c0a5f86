#!/bin/bash -l
# Two nodes with a rank on each of four GPUs.
#   qsub scripts/pbs/two-nodes.sh
# typed where allranks is checked out. Change the #PBS lines to what your centre asks for; on Polaris also
##PBS -A PROJECT -q debug -l filesystems=home:eagle
# with one # less. `allranks submit` writes such a script itself, from a file about the machine.
#PBS -N allranks-two-nodes
#PBS -l select=2:ncpus=32:mpiprocs=4:ngpus=4
#PBS -l place=scatter
#PBS -l walltime=01:00:00
#PBS -j oe
#PBS -k doe

training=(model=cnn)   # overrides: `allranks train --help` lists them
run=runs/two-nodes   # submitted again, the training goes on there until it is finished

umask 022
export ALLRANKS_DEADLINE=$(($(date +%s) + 3570))   # the walltime in seconds, less 30 for this script
cd "$PBS_O_WORKDIR" || exit 1
# The environment that allranks is installed in; module load lines, where your centre has such, come first.
# shellcheck source=/dev/null
. .venv/bin/activate

exec allranks launch --nodes 2 "${training[@]}" run.dir="$run"
