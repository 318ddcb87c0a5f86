"""`allranks submit --next`: after a job has stopped in order, the job that goes on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from allranks.base.errors import EXIT_REQUEUE, EXIT_STUCK, UserError
from allranks.job import scheduler
from allranks.job.scheduler import Scheduler, ThisJob
from allranks.run import checkpoint
from allranks.run.cells import JOB, is_finished, read_job
from allranks.submit.queue import queue_again
from allranks.submit.task import task_again


class RunStuck(UserError):
    """A job has gained no step, so another one of its kind would gain none either."""

    code = EXIT_STUCK


def go_on(directory: str) -> int:
    """Queues the job that goes on with the run, if it takes one; the exit code of this job's script.

    A run that is finished needs none: what is left of its chain is cancelled. A run with a later job in
    the queue needs none. Raises UserError where none can be queued, RunStuck where none would help.
    """
    job, me = read_job(Path(directory) / JOB), scheduler.this_job(os.environ)
    if not job or me is None:
        raise UserError(f"--next {directory} is for the script of a job that `allranks submit` has queued.")
    kind = scheduler.named(job["scheduler"])
    later = _later_ids(kind, [str(job_id) for job_id in job["job_ids"]], me)
    if is_finished(directory):
        _cancel_rest_of_chain(kind, later)
        return 0
    waiting = kind.states(later)
    if waiting:
        print(f"{directory} is not finished: job {next(iter(waiting))} goes on", flush=True)
        return EXIT_REQUEUE
    if _is_last(job):
        print(f"{directory} is not finished: this was the last job of it", flush=True)
        return EXIT_REQUEUE
    if _is_first_start_of_this(directory, me):
        _queue_successor(kind, directory, me)
    return EXIT_REQUEUE


def _later_ids(kind: Scheduler, ids: list[str], me: ThisJob) -> list[str]:
    """Of a run's jobs those that were queued after this one."""
    for position, job_id in enumerate(ids):
        if kind.is_same_job(job_id, me.id):
            return ids[position + 1 :]
    return []


def _is_last(job: dict[str, Any]) -> bool:
    """Of a chain with a given number of links, and of a program: nobody can tell what that has gained."""
    return bool(job["program"] or job["order"].get("chain"))


def _cancel_rest_of_chain(kind: Scheduler, later: list[str]) -> None:
    try:
        waiting = list(kind.states(later))
        if waiting:
            kind.cancel(waiting[::-1])  # the last one first, so that none starts in between
            print(f"finished: {', '.join(waiting)} cancelled", flush=True)
    except UserError as error:  # they will find that there is nothing left to do
        print(f"allranks: {error}", file=sys.stderr, flush=True)


def _is_first_start_of_this(directory: str, me: ThisJob) -> bool:
    """Marks in the run directory that this start of this job has asked for a successor, and the step that
    the run had come to; False where that mark is there already. So a job that the scheduler starts twice
    queues one successor, and a job that gained nothing is known by the marks of those before it.
    """
    before = max((int(path.read_text() or 0) for path in Path(directory).glob(".next-*")), default=-1)
    step = max(checkpoint.steps(directory), default=0)
    mark = Path(directory) / f".next-{me.id}-{me.restarts}"
    try:
        with mark.open("x") as file:
            file.write(str(step))
    except FileExistsError:
        return False
    except OSError as error:
        mark.unlink(missing_ok=True)  # an empty one would stand for a successor
        raise UserError(
            f"{directory} cannot be written ({error.strerror}), so no job is queued: free some space or "
            "quota there, then `allranks submit --cell` goes on from the newest checkpoint."
        ) from error
    if step <= before:
        raise RunStuck(
            f"{directory}: this job has not gained a step (step {step}), so no other is queued. Give a "
            "longer --walltime with `allranks submit --cell`."
        )
    return True


def _queue_successor(kind: Scheduler, directory: str, me: ThisJob) -> None:
    """Queues this job once more, where its owner may ask for that; else another job, after this one."""
    step = max(checkpoint.steps(directory), default=0)
    if kind.owner_may_requeue:
        # Said before it is done, because the scheduler ends this process with the job.
        print(f"{directory} goes on from step {step}: job {me.id} is queued again", flush=True)
        kind.requeue(me.id)
        return
    # The training of this job has ended, so that a successor that waits for nothing does no harm.
    after = me.id if kind.can_be_waited_for(me.id) else None
    [job_id] = queue_again(task_again(directory, {}, must_be_idle=False), after)
    print(f"{directory} goes on from step {step}: job {job_id} is queued", flush=True)
