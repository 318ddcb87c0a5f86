"""`allranks submit`: its options, and what it is asked to do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from allranks.job.machine import LAUNCHERS
from allranks.launch import options
from allranks.submit import successor
from allranks.submit.queue import enqueue

USAGE = """%(prog)s [options] [machine.key=value ...]
                       [overrides of the training, -m | -- PROGRAM ARGS...]"""


def submit(arguments: Sequence[str]) -> int:
    """`allranks submit ARGUMENTS`; the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="allranks submit", usage=USAGE, allow_abbrev=False)
    add = parser.add_argument
    add("--machine", metavar="M", help="machine file to use; default: the one this host belongs to")
    add("--nodes", type=int, metavar="K", help="nodes (chunks, where a queue deals in those); default: 1")
    add("--walltime", metavar="HH:MM:SS", help="how long the job may run")
    add("--account", metavar="NAME", help="whose account pays")
    add("--queue", metavar="Q", help="queue, partition or QOS; default: the machine file's")
    add("--name", metavar="N", help="the job's name; default: the run's")
    add("--chain", type=int, metavar="K", help="K jobs one after another in one run directory, and no more")
    add("--after", metavar="ID", help="start once that job has ended")
    add("--cell", metavar="DIR", help="submit a cell of a sweep (or any run that was submitted) once more")
    add("-n", dest="ranks", type=int, metavar="RANKS", help="ranks in all; default: the machine file's")
    add("--ppn", type=int, metavar="P", help="ranks per node")
    add("--launcher", metavar="|".join(LAUNCHERS), help="who starts the ranks")
    add("--max-restarts", type=int, default=None, metavar="N", help="in the job: as for allranks launch")
    add("--min-ranks", type=int, metavar="M", help="in the job: as for allranks launch")
    add("--config-dir", metavar="DIR", help="a folder with machine/NAME.yaml (and groups) of your own")
    add("--next", metavar="DIR", help="of a job script: what comes after this job, once it has stopped")
    add("--no-preflight", action="store_true", help="start at once, without checking the hosts first")
    add("--dry-run", action="store_true", help="show the script, the command and every rank's place")
    add("--json", action="store_true", help="the answer for programs")
    args, rest = options.parsed(parser, arguments)
    if args.next:
        return successor.go_on(parser, args.next)
    return enqueue(args, rest)
