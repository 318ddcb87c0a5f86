"""What has become of runs: finished, running, stopped, killed, lost. Any process can see it from outside.

Nothing but the run's files and the scheduler's answers tells it, so a run whose processes have vanished has
a state as well. No torch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from allranks.base.errors import EXIT_REQUEUE, UserError
from allranks.base.text import as_text
from allranks.job import scheduler
from allranks.run import checkpoint
from allranks.run.cells import JOB, is_finished, read_job, text_of
from allranks.run.claim import is_beating

STOPPED = str(EXIT_REQUEUE)  # in the file exit_code
ENDED_BY_SIGNAL = {str(128 + number) for number in (signal.SIGTERM, signal.SIGKILL)}
NOT_KNOWN = "not known"  # stands for the scheduler's word if the scheduler does not answer
WAITING = ("queued", "held", "waiting")  # words of a scheduler for a job that has not started


@dataclass(frozen=True)
class Seen:
    """What can be seen of a run from outside, and from which its state follows."""

    is_finished: bool = False
    queue_state: str = ""  # the scheduler's word for the run's job; empty if none is in the queue
    next_job: str = ""  # the job with that state
    exit_code: str = ""  # the exit code that the last job's script has noted; empty if it could not
    why_ended: str = ""  # why the scheduler has ended the last job, in its own words
    has_job: bool = False  # the run was queued at some time
    is_at_work: bool = False  # a process has touched the directory within half a minute
    has_checkpoint: bool = False
    has_started: bool = True  # ranks have worked on it; a sweep makes a cell's directory long before that


def state_of(seen: Seen) -> str:
    """The state of a run, in words for a person.

    `running` and the like are the scheduler's words for its job. A run that has `stopped` has a checkpoint
    to go on from. A job that was `killed` has got a signal; one that is `lost` has ended without a trace,
    as with its host. A cell of a sweep may be `not started`, because the sweep ended before its turn.
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
    """The state of a run that is not finished, has no job in the queue, and on which no process works."""
    if seen.exit_code not in ("", "0", STOPPED, *ENDED_BY_SIGNAL):
        return f"failed ({seen.exit_code})"
    if seen.why_ended:
        return f"killed ({seen.why_ended})"
    if seen.exit_code == STOPPED:
        return "stopped"
    if seen.exit_code in ENDED_BY_SIGNAL:
        return "killed"
    if not seen.has_job and not seen.has_started:
        return "not started"
    # A run that was started by hand leaves no exit code.
    return "stopped" if seen.has_checkpoint and not seen.has_job else "lost"


# A function that says how jobs stand in the queue. It gets the contents of job.json files, and a function
# to call with warnings. It returns the state of each job that is in a queue, by the job's id.
AskQueue = Callable[[Sequence[dict[str, Any]], Callable[[str], None]], dict[str, str]]


class RunState(NamedTuple):
    """What has become of one run."""

    words: str  # as state_of() puts it
    job_id: str | None  # the job that is in the queue, else the last one; None for a run started by hand


def states_of(
    directories: Sequence[Path], warn: Callable[[str], None], ask: AskQueue | None = None
) -> dict[Path, RunState]:
    """What has become of the run in each directory. Each scheduler is asked once for all of its jobs.

    `ask` may answer in its place, as from memory: it is given the job.json of each unfinished run. `warn`
    is called with a sentence for each record or directory that cannot be read, and for each scheduler that
    does not answer.
    """
    jobs: dict[Path, dict[str, Any]] = {}
    for directory in directories:
        try:
            jobs[directory] = read_job(directory / JOB)
        except UserError as error:
            warn(str(error))
            jobs[directory] = {}
    unfinished = [job for directory, job in jobs.items() if job and not is_finished(directory)]
    in_queue = (ask or queue_states)(unfinished, warn)
    states: dict[Path, RunState] = {}
    for directory, job in jobs.items():
        try:
            states[directory] = _state(directory, job, in_queue)
        except OSError as error:  # a directory whose files this user may not read
            warn(f"The state of {as_text(str(directory))} is not known ({error.strerror}).")
            states[directory] = RunState("not known", None)
    return states


def queue_states(jobs: Sequence[dict[str, Any]], warn: Callable[[str], None]) -> dict[str, str]:
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
            now |= dict.fromkeys(ids, NOT_KNOWN)
    return now


def _why_ended(directory: Path, job: dict[str, Any]) -> str:
    """Why the scheduler has ended the last job, in its own words; empty if it has not said so."""
    kind = _kind_of(job)
    return kind.why_ended(directory, job["job_ids"]) if kind else ""


def _kind_of(job: Mapping[str, Any]) -> scheduler.Scheduler | None:
    """The scheduler of a run's jobs; None for a run by hand, and for an unknown scheduler."""
    return next((kind for kind in scheduler.SCHEDULERS if kind.name == job.get("scheduler")), None)


def _is_one_of(job: Mapping[str, Any], unique_id: str) -> bool:
    """Whether the job with this unique id may be one of a run's own; an empty one stands for no job."""
    kind = _kind_of(job)
    if kind is None or not unique_id:
        return False
    return any(kind.may_be(job_id, unique_id) for job_id in job["job_ids"])


def _has_checkpoint(directory: Path) -> bool:
    """Whether the run has a checkpoint that this user can see."""
    try:
        return bool(checkpoint.steps(directory))
    except OSError:
        return False


def _state(directory: Path, job: dict[str, Any], in_queue: Mapping[str, str]) -> RunState:
    """The state of one run. `in_queue` has the scheduler's words for all jobs that are in the queue."""
    ids = job.get("job_ids", [])
    alive = next((job_id for job_id in ids if job_id in in_queue), None)
    last = ids[-1] if ids else None
    if alive and in_queue[alive] == NOT_KNOWN:
        # The scheduler has not answered, so nothing is known of any job of the run. The newest one is
        # shown.
        alive = last
    seen = Seen(
        is_finished=is_finished(directory),
        queue_state=in_queue[alive] if alive else "",
        next_job=alive or "",
        exit_code=text_of(directory / "exit_code"),
        why_ended=_why_ended(directory, job),
        has_job=bool(job),
        # None of the run's jobs is in the queue any more. So a recent heartbeat of one of them does not
        # count: it is that job's last one. Only a run that was started by hand is at work.
        is_at_work=not alive and is_beating(directory, partial(_is_one_of, job)),
        has_checkpoint=_has_checkpoint(directory),
        has_started=(directory / "environment.json").exists() or any(directory.glob("owner-*.json")),
    )
    return RunState(state_of(seen), alive or last)
