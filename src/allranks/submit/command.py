"""`allranks submit`: reads the command line, queues what it asks for, and says what was queued."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from allranks.base.errors import UserError
from allranks.base.text import table
from allranks.job.batch import JOB_LOG
from allranks.launch import dryrun, options
from allranks.submit import successor
from allranks.submit.queue import queue_again, queue_new
from allranks.submit.task import Task, check_idle, new_task, task_again

USAGE = """%(prog)s [options] [machine.key=value ...]
                       [overrides of the training, -m | -- PROGRAM ARGS...]"""

DESCRIPTION = """\
Writes a job script for PBS or Slurm that starts a training, or the program
after `--`, and queues it. With -m a sweep becomes a job array."""

EXAMPLES = """\
examples:
  allranks submit --nodes 2 --walltime 00:30:00 --account NAME model=cnn
  allranks submit --walltime 00:30:00 --account NAME -- python my_train.py
  allranks submit --dry-run --machine polaris --walltime 00:30:00 \\
      --account NAME model=cnn              shown anywhere, nothing is queued
  allranks submit --cell runs/cnn/1         once more

docs/submit.md has more."""


def submit(arguments: Sequence[str]) -> int:
    """`allranks submit ARGUMENTS`; the exit code. Raises UserError."""
    args, rest = options.parse(options.parser("submit", USAGE, DESCRIPTION, EXAMPLES), arguments)
    if args.next:
        return successor.go_on(args.next)
    if args.cell:
        if rest:
            raise UserError(f"{rest[0]} cannot be given with --cell: its configuration is frozen.")
        task = task_again(args.cell, vars(args), must_be_idle=not (args.after or args.dry_run))
    else:
        found = new_task(vars(args), rest)
        if found is None:  # after --help
            return 0
        task = found
    if args.dry_run:
        print(_dry_run_json(task, args.after) if args.json else _dry_run(task, args.after))
        return 0
    if args.after and not task.scheduler.exists(args.after):
        raise UserError(
            f"--after {args.after}: {task.scheduler.title} knows no such job; one that waits for it would "
            "never run. Look with `allranks runs`, and leave --after out where it has ended."
        )
    if not args.cell and not args.after:
        check_idle(task)
    ids = queue_again(task, args.after) if args.cell else queue_new(task, args.after)
    _say(task, ids, as_json=bool(args.json))
    return 0


def _say(task: Task, ids: Sequence[str], as_json: bool) -> None:
    """What was queued, and how to follow it."""
    below = f"/*/{JOB_LOG}" if task.is_sweep else f"/{JOB_LOG}"
    if as_json:
        print(json.dumps({"job_ids": ids, "directory": task.directory, "log": task.directory + below}))
        return
    number_of_cells = f" ({len(task.cells)} cells)" if task.is_sweep else ""
    print(f"{'jobs' if len(ids) > 1 else 'job '}       {', '.join(ids)}")
    print(f"directory  {task.directory}{number_of_cells}")
    # The * is the shell's to read, whatever is in the rest.
    print(f"follow     tail -F {shlex.quote(task.directory)}{below}")
    for note in task.notes:
        print(f"note       {note}")


def _commands(task: Task, after: str | None) -> list[list[str]]:
    """The commands that would queue the task's jobs."""
    links = range(1, task.order.chain or 1)
    waits = [after, *(f"ID_OF_JOB_{link}" for link in links)]
    return [task.scheduler.submit_command(str(task.script_path), wait) for wait in waits]


def _dry_run_json(task: Task, after: str | None) -> str:
    """The dry run for programs. Nothing was written, and no scheduler was asked."""
    cells = [{"directory": cell.directory, "overrides": cell.overrides} for cell in task.cells]
    return json.dumps(
        {
            "submit": _commands(task, after),
            "directory": task.directory,
            "script_path": str(task.script_path),
            "script": task.script_text(),
            "cells": cells,
            "launch": json.loads(dryrun.as_json(task.plan, "placeholders")),
        }
    )


def _dry_run(task: Task, after: str | None) -> str:
    """The dry run for people. Nothing was written, and no scheduler was asked."""
    commands = os.linesep.join(map(shlex.join, _commands(task, after)))
    parts = [
        f"Submit:\n{commands}",
        f"Job script {task.script_path}:\n{task.script_text().rstrip()}",
    ]
    if task.is_sweep:
        rows = [(Path(cell.directory).name, *cell.overrides) for cell in task.cells]
        parts.append("Cells:\n" + table(rows))
    parts += [f"Note: {note}" for note in task.notes]
    parts.append("In the job:\n" + dryrun.text(task.plan, "placeholders, as there is no job yet"))
    return "\n\n".join(parts)
