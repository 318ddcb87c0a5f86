"""`allranks runs` lists runs, and says what became of them; `allranks cancel` ends the jobs of one."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allranks.base.errors import EXIT_REQUEUE, UserError
from allranks.base.text import as_text, table
from allranks.job import scheduler
from allranks.job.scheduler import Scheduler
from allranks.run import checkpoint
from allranks.run import directory as rundir
from allranks.run.cells import CELLS, JOB, is_finished, read_job, text_of
from allranks.run.claim import is_beating
from allranks.run.results import FIGURES, Figures, figures, overrides_of

STOPPED = str(EXIT_REQUEUE)  # in the file exit_code
ENDED_BY_SIGNAL = {str(128 + number) for number in (signal.SIGTERM, signal.SIGKILL)}
WAITING = ("queued", "held", "waiting")  # words of a scheduler for a job that has not started


@dataclass(frozen=True)
class Seen:
    """What can be seen of a run from outside, and from which its state follows."""

    is_finished: bool = False
    queue_state: str = ""  # the scheduler's word for the run's job; empty where none is in the queue
    next_job: str = ""  # the job with that state
    exit_code: str = ""  # as the last job's script has left it; empty where it could not
    why_ended: str = ""  # why the scheduler has ended the last job, in its own words
    has_job: bool = False  # the run was queued at some time
    is_at_work: bool = False  # a process has touched the directory within half a minute
    has_checkpoint: bool = False


def state_of(seen: Seen) -> str:
    """The state of a run, in words for a person.

    `running` and the like are the scheduler's words for its job. A run that has `stopped` has a checkpoint
    to go on from. A job that was `killed` has got a signal; one that is `lost` has ended without a trace,
    as with its host.
    """
    if seen.is_finished:
        return "finished"
    if seen.queue_state:
        goes_on = seen.exit_code == STOPPED and seen.queue_state.startswith(WAITING)
        return f"stopped (goes on by {seen.next_job}, {seen.queue_state})" if goes_on else seen.queue_state
    if seen.is_at_work:
        return "running"
    return _end_of(seen)


def _end_of(seen: Seen) -> str:
    """How a run has ended that is not finished, and of which nothing is in the queue."""
    if seen.exit_code not in ("", "0", STOPPED, *ENDED_BY_SIGNAL):
        return f"failed ({seen.exit_code})"
    if seen.why_ended:
        return f"killed ({seen.why_ended})"
    if seen.exit_code == STOPPED:
        return "stopped"
    if seen.exit_code in ENDED_BY_SIGNAL:
        return "killed"
    # A run that was started by hand leaves no exit code.
    return "stopped" if seen.has_checkpoint and not seen.has_job else "lost"


def listed(root: str, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every run below `root`: its state, job, epochs, accuracies, directory and overrides."""
    if not Path(root).is_dir():
        raise UserError(f"{root} is no folder: give one with runs in it. The default is ./runs.")
    found = sorted(_below(root))
    jobs: dict[Path, dict[str, Any]] = {}
    for directory in found:
        try:
            jobs[directory] = read_job(directory / JOB)
        except UserError as error:
            warn(str(error))
            jobs[directory] = {}
    now = _states([job for directory, job in jobs.items() if job and not is_finished(directory)], warn)
    return [_row(directory, jobs[directory], now) for directory in found]


def _states(jobs: Sequence[dict[str, Any]], warn: Callable[[str], None]) -> dict[str, str]:
    """The states of all jobs of these records that are in a queue. Each scheduler is asked once."""
    by_name: dict[str, list[str]] = {}
    for job in jobs:
        by_name.setdefault(str(job["scheduler"]), []).extend(job["job_ids"])
    now: dict[str, str] = {}
    for name, ids in by_name.items():
        try:
            now |= scheduler.named(name).states(ids)
        except UserError as error:  # what is in the directories can be shown all the same
            warn(str(error))
            now |= dict.fromkeys(ids, "not known")
    return now


def _below(root: str) -> Iterator[Path]:
    """The runs' directories; a folder that vanishes meanwhile, as checkpoints do, is passed over."""
    for folder, below, names in os.walk(root):
        if (rundir.CONFIG in names or JOB in names) and CELLS not in names:
            below.clear()
            yield Path(folder)


def _why_ended(directory: Path, job: dict[str, Any]) -> str:
    """The scheduler's words; empty where it has said nothing, or is one that nobody knows."""
    known = [kind for kind in scheduler.SCHEDULERS if job and kind.name == job["scheduler"]]
    return known[0].why_ended(directory) if known else ""


def _has_checkpoint(directory: Path) -> bool:
    """Whether the run has a checkpoint that this user can see."""
    try:
        return bool(checkpoint.steps(directory))
    except OSError:
        return False


def _row(directory: Path, job: dict[str, Any], now: dict[str, str]) -> dict[str, Any]:
    """What is shown of a run. `now` has the states of all jobs that are in the queue."""
    ids = job.get("job_ids", [])
    alive = next((job_id for job_id in ids if job_id in now), None)
    seen = Seen(
        is_finished=is_finished(directory),
        queue_state=now[alive] if alive else "",
        next_job=alive or "",
        exit_code=text_of(directory / "exit_code"),
        why_ended=_why_ended(directory, job),
        has_job=bool(job),
        is_at_work=not job and is_beating(directory),
        has_checkpoint=_has_checkpoint(directory),
    )
    come_to = figures(directory)
    try:
        overrides = overrides_of(directory)
    except UserError:  # it has been said that its job.json cannot be read
        overrides = []
    return {
        "state": state_of(seen),
        "job_id": alive or (ids[-1] if ids else None),
        "epochs": come_to.epochs,
        "val/accuracy": come_to.val_accuracy,
        "test/accuracy": come_to.test_accuracy,
        "directory": str(directory),
        "overrides": overrides,
    }


@dataclass(frozen=True)
class Jobs:
    """The jobs of a run, or of a sweep and of its cells."""

    ids: Sequence[str]  # that can be ended: the run's or the sweep's own, and those of cells that went on
    array_of: Mapping[str, str]  # of each job that an array has, the array

    def alive(self, there: Collection[str]) -> list[str]:
        """Those of `ids` that are in the queue, of which `there` is what the scheduler lists.

        PBS lists an array under its own id, Slurm the jobs that it has.
        """
        arrays = {self.array_of[job_id] for job_id in there if job_id in self.array_of}
        return [job_id for job_id in self.ids if job_id in there or job_id in arrays]


def _jobs_of(run: str, kind: Scheduler, own: Sequence[str]) -> Jobs:
    """The jobs of a run directory, or of a sweep's; `own` are those in its own job.json."""
    ids, array_of = list(own), dict[str, str]()
    for record in sorted(Path(run).glob(f"*/{JOB}")):
        cell = record.parent.name
        members = {kind.job_of_array(array, int(cell)): array for array in own} if cell.isdecimal() else {}
        for job_id in read_job(record).get("job_ids", []):
            if job_id in members:
                array_of[job_id] = members[job_id]
            elif job_id not in ids:
                ids.append(job_id)
    return Jobs(ids, array_of)


def cancelled(run: str) -> list[str]:
    """Ends the jobs of a run directory, of a sweep's, or of a cell's; their ids.

    A sweep's jobs are its array, and those by which cells have gone on. Raises UserError where there is
    nothing to end.
    """
    job = read_job(Path(run) / JOB)
    if not job:
        raise UserError(f"{run} has no {JOB}: give the directory of a run that `allranks submit` queued.")
    kind = scheduler.named(job["scheduler"])
    jobs = _jobs_of(run, kind, job["job_ids"])
    if not jobs.ids:
        raise UserError(f"{run}: the scheduler has told no id for its job. Look for it in the queue.")
    alive = jobs.alive(kind.states([*jobs.ids, *jobs.array_of]))
    if not alive:
        ids = ", ".join(jobs.ids)
        raise UserError(f"{run}: {ids} has ended already. `allranks runs` shows how it went.")
    kind.cancel(alive[::-1])  # the last of a chain first, so that none starts in between
    return alive


def list_runs(arguments: Sequence[str]) -> int:
    """`allranks runs [DIR]`; the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="allranks runs", description="lists runs", allow_abbrev=False)
    parser.add_argument("root", nargs="?", default="runs", metavar="DIR", help="default: ./runs")
    parser.add_argument("--json", action="store_true", help="one JSON line a run")
    args = parser.parse_args(arguments)
    found = listed(args.root, lambda text: print(f"allranks: {text}", file=sys.stderr))
    if args.json:
        print("".join(json.dumps(row) + "\n" for row in found), end="")
        return 0
    header = ("state", "job", *FIGURES, "directory", "overrides")
    cells = []
    for row in found:
        come_to = Figures(*(row[name] for name in FIGURES))
        words = " ".join(row["overrides"])
        directory = as_text(row["directory"])
        cells.append((row["state"], row["job_id"] or "-", *come_to.columns(), directory, words))
    print(table([header, *cells]))
    return 0


def cancel(arguments: Sequence[str]) -> int:
    """`allranks cancel RUN`; the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="allranks cancel", description="ends a run's jobs")
    parser.add_argument("run", metavar="RUN", help="a run's directory, a sweep's, or one cell's")
    args = parser.parse_args(arguments)
    print(f"cancelled {', '.join(cancelled(args.run))} of {args.run}")
    return 0
