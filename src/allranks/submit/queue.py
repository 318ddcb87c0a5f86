"""Queues a task: writes its directory and its job script, hands them to the scheduler, records the ids."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from allranks.base import files
from allranks.base.errors import UserError, show
from allranks.job.batch import JOB_LOG
from allranks.job.scheduler import NoAnswer
from allranks.run import directory as rundir
from allranks.run.cells import CELLS, JOB, make_cells, note_job, read_job, write_list
from allranks.submit.task import Task


def queue_new(task: Task, after: str | None) -> list[str]:
    """Makes the task's directory and queues its jobs, the first after the job `after`. Returns their ids.

    If the scheduler refuses, a directory that was made here is removed. If it is not known whether a job
    was queued (NoAnswer), the directory stays for that job.
    """
    fresh = not Path(task.directory).exists()
    try:
        if task.cells:
            make_cells(task.directory, task.cells)
        else:
            rundir.create(task.directory, None)
    except UserError as error:
        # If the file system has failed half-way, everything in the directory is from here, and is removed.
        # If another run has just taken the directory, the error's cause is not an OSError, and the
        # directory stays.
        if fresh and isinstance(error.__cause__, OSError):
            shutil.rmtree(task.directory, ignore_errors=True)
        raise
    return _queue(task, after, fresh)


def queue_again(task: Task, after: str | None) -> list[str]:
    """Queues jobs for a run whose directory exists, the first after the job `after`. Returns their ids."""
    ids = _queue(task, after, fresh=False)
    try:
        note_job(task.directory, ids[0])
    except OSError as error:  # the list is for people: the job is queued all the same, and in job.json
        show(f"job {ids[0]} is queued, but {CELLS} of its sweep cannot be written ({error.strerror})")
    return ids


def _queue(task: Task, after: str | None, fresh: bool) -> list[str]:
    """Writes the script, queues it as often as the chain has links, and records the ids."""
    ids: list[str] = []
    try:
        with rundir.writing(task.directory):
            task.script_path.write_text(task.script_text())
            if task.is_sweep:
                # `tail -F DIR/*/job.log` follows only files that exist when it is started.
                for cell in task.cells:
                    (Path(cell.directory) / JOB_LOG).touch()
            _record(task, ids)  # a job may start, and read it, before its id is known here
        for _ in range(task.order.chain or 1):
            if ids:
                # If the job before has ended already, the next one must not wait for it: PBS would lose
                # that job.
                after = ids[-1] if task.scheduler.states(ids[-1:]) else None
            ids.append(task.scheduler.submit(str(task.script_path), after))
        with rundir.writing(task.directory):
            _record(task, ids)
    except UserError as error:
        if ids:
            with suppress(OSError):
                _record(task, ids)
            raise UserError(f"{error} Queued until then, in {task.directory}: {', '.join(ids)}.") from error
        if isinstance(error, NoAnswer):
            raise NoAnswer(
                f"{error} The job is named {task.order.name}, and its directory, {task.directory}, is "
                "kept. Where there is no such job, `allranks submit --cell` with that directory queues one."
            ) from error
        if fresh:
            shutil.rmtree(task.directory, ignore_errors=True)  # a network file system may keep a file of it
        raise
    return ids


def _record(task: Task, ids: Sequence[str]) -> None:
    """Writes job.json of the run, or of the sweep and of every cell of it."""
    about = {
        "scheduler": task.scheduler.name,
        "order": task.order.as_kept(),
        "program": task.program,
        "submitted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    of_cells: list[str | None] = []
    for index, cell in enumerate(task.cells):
        if task.array_jobs:
            cell_ids = [task.scheduler.job_of_array(ids[0], index)] if ids else []
        else:
            cell_ids = list(ids)
        of_cells.append(cell_ids[0] if cell_ids else None)
        of_run = {"overrides": cell.overrides, "config_sha256": cell.sha256}
        _write(Path(cell.directory) / JOB, about, cell_ids, of_run)
    if task.is_sweep or not task.cells:  # a sweep's own record, or a program's
        _write(Path(task.directory) / JOB, about, ids, {"overrides": []})
    if task.is_sweep:
        write_list(task.directory, task.cells, of_cells)


def _write(path: Path, about: dict[str, Any], ids: Sequence[str], of_run: dict[str, Any]) -> None:
    """Writes one job.json. The earlier jobs stay in it, before the new ones: some may still be at work."""
    known_ids = list(dict.fromkeys([*read_job(path).get("job_ids", []), *ids]))
    files.write_json(path, about | {"job_ids": known_ids} | of_run)
