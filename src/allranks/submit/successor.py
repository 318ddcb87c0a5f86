"""`allranks submit --next`: queues the job that goes on with a run.

The job script calls it when its training has stopped with a checkpoint, because the job's time was over.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from allranks.base.errors import EXIT_REQUEUE, EXIT_STUCK, UserError, show
from allranks.job import scheduler
from allranks.job.batch import ending_by
from allranks.job.scheduler import NoAnswer, Scheduler, ServerUnreached, ThisJob
from allranks.report import compare_sweep
from allranks.run import checkpoint, program_progress
from allranks.run.cells import JOB, is_finished, read_job
from allranks.submit.queue import queue_again
from allranks.submit.script import END_S
from allranks.submit.task import task_again

# How long a job holds its nodes at most for a server that is not reached. Each try doubles the pause.
MOST_PATIENCE_S, LONGEST_PAUSE_S = 600.0, 15.0
LAST_S = 5  # so much of the walltime is kept for this program's own end

Answer = TypeVar("Answer")


class RunStuck(UserError):
    """A job has gained no step, so another one of its kind would gain none either."""

    code = EXIT_STUCK


def go_on(directory: str) -> int:
    """Queues the job that goes on with the run, if one is needed. Returns the job script's exit code.

    A run that is finished needs none: the jobs that are left of its chain are cancelled. A run with a later
    job in the queue needs none. Raises UserError if none can be queued, RunStuck where none would help.
    """
    job, me = read_job(Path(directory) / JOB), scheduler.this_job(os.environ)
    if not job or me is None:
        raise UserError(f"--next {directory} is for the script of a job that `allranks submit` has queued.")
    kind = scheduler.named(job["scheduler"])
    ids = [str(job_id) for job_id in job["job_ids"]]
    recorded = [position for position, job_id in enumerate(ids) if kind.is_same_job(job_id, me.id)]
    later = ids[recorded[0] + 1 :] if recorded else []
    if recorded:
        me = me._replace(id=ids[recorded[0]])  # with the cluster of Slurm's that it was sent to
    if is_finished(directory):
        _cancel_rest_of_chain(kind, later)
        return 0
    waiting = _patiently(partial(kind.states, later), directory, is_repeatable=True)
    if waiting:
        print(f"{directory} is not finished: job {next(iter(waiting))} goes on", flush=True)
        return EXIT_REQUEUE
    if _is_last(job, directory):
        print(f"{directory} is not finished: this was the last job of it", flush=True)
        about_sweep = compare_sweep.after_cell(
            directory, "stopped", ended=compare_sweep.Ended(was_stopped=True)
        )
        if about_sweep:
            print(about_sweep, flush=True)
        return EXIT_REQUEUE
    mark = _mark_this_start(directory, me)
    if mark is None:
        return EXIT_REQUEUE
    try:
        _queue_successor(kind, directory, me)
    except NoAnswer:
        raise
    except UserError:
        with suppress(OSError):  # no successor was queued, so another try may queue one
            mark.unlink(missing_ok=True)
        raise
    return EXIT_REQUEUE


def _is_last(job: dict[str, Any], directory: str) -> bool:
    """Whether no other job is to be queued after those that there are.

    A chain has as many jobs as the user has asked for. If a program calls neither heartbeat() nor
    should_stop(), it is not known whether it has gained anything, so it gets no further job either.
    """
    is_mute = bool(job["program"]) and program_progress.read(directory) == 0
    return is_mute or bool(job["order"].get("chain"))


class Reached(NamedTuple):
    """How far a run has come. Of two the later one is greater."""

    step: int
    epochs: int  # that are done: a job may have had time for an epoch's evaluation only


def _reached(directory: str) -> Reached:
    """How far the run has come: its newest checkpoint says so, or the number of a program's calls.

    A checkpoint that lacks a file is passed over, as the next job will pass it over. Of the files only
    state.json, which is small, is read: to read all may take longer than this job has left.
    """
    for step in checkpoint.steps(directory):
        path = checkpoint.path_of(directory, step)
        try:
            [state] = checkpoint.read_some(path, ["state.json"]).values()
            return Reached(step, int(json.loads(state)["epoch"]))
        except (checkpoint.Damaged, OSError):
            continue
        except (ValueError, KeyError, TypeError):  # a version to come may call it otherwise
            return Reached(step, 0)
    return Reached(program_progress.read(directory), 0)


def _cancel_rest_of_chain(kind: Scheduler, later: list[str]) -> None:
    try:
        waiting = list(kind.states(later))
        if waiting:
            kind.cancel(waiting[::-1])  # the last one first, so that none starts in between
            print(f"finished: {', '.join(waiting)} cancelled", flush=True)
    except UserError as error:  # the jobs that are left will find that there is nothing to do
        show(error)


def _patiently(ask: Callable[[], Answer], directory: str, is_repeatable: bool = False) -> Answer:
    """Calls `ask`, which asks the scheduler, and returns its answer.

    While the server cannot be reached, `ask` is called again, as long as this job has time. If the server
    was reached but has not answered, `ask` is called again only if it `is_repeatable`: the first call may
    have queued a job, and a second call would queue another one. When the time is over, raises
    ServerUnreached, which tells the user how to go on.
    """
    passing = (ServerUnreached, NoAnswer) if is_repeatable else (ServerUnreached,)
    give_up_at = time.monotonic() + min(_left_s(), MOST_PATIENCE_S)
    pause_s = 1.0
    while True:
        try:
            with ending_by(give_up_at):
                return ask()
        except passing as error:
            if time.monotonic() + pause_s > give_up_at:
                raise ServerUnreached(
                    f"{error} No answer came until this job's end, so {_no_job_goes_on(directory)}"
                ) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _no_job_goes_on(directory: str) -> str:
    """The end of a sentence: that the run stays where it is, and how its owner can have it go on."""
    command = f"`allranks submit --cell {shlex.quote(directory)}`"
    return f"no job goes on: {command} does, from the newest checkpoint."


def _left_s() -> float:
    """For how many seconds this job may still ask its scheduler; infinity if its end is not known."""
    job_end = os.environ.get("ALLRANKS_JOB_END", "")
    if job_end.isdecimal():
        return int(job_end) - LAST_S - time.time()
    deadline = os.environ.get("ALLRANKS_DEADLINE", "")  # a job script of an earlier version sets only this
    if deadline.isdecimal():
        return int(deadline) + END_S - LAST_S - time.time()
    return math.inf


def _mark_this_start(directory: str, me: ThisJob) -> Path | None:
    """Marks in the run directory that this start of this job has asked for a successor.

    Returns None if the mark is there already. The mark holds the step and the number of epochs that the run
    has reached. So a job that the scheduler starts twice queues only one successor, and the marks of
    earlier jobs show whether this job has gained anything.
    """
    before: list[tuple[int, ...]] = [(-1,)]  # below every step: no job has left a mark yet
    for path in Path(directory).glob(".next-*"):
        # Marks of earlier versions hold the step alone. An empty one counts as step 0.
        before.append(tuple(map(int, (path.read_text() or "0").split())))
    reached = _reached(directory)
    mark = Path(directory) / f".next-{me.id}-{me.restarts}"
    try:
        with mark.open("x") as file:
            file.write(f"{reached.step} {reached.epochs}")
    except FileExistsError:
        return None
    except OSError as error:
        with suppress(OSError):  # an empty one would stand for a successor
            mark.unlink(missing_ok=True)
        raise UserError(
            f"{directory} cannot be written ({error.strerror}), so no job is queued: free some space or "
            "quota there, then `allranks submit --cell` goes on from the newest checkpoint."
        ) from error
    if reached <= max(before):
        raise RunStuck(
            f"{directory}: this job has not gained a step (step {reached.step}), so no other is queued. "
            "Give a longer --walltime with `allranks submit --cell`."
        )
    return mark


def _queue_successor(kind: Scheduler, directory: str, me: ThisJob) -> None:
    """Queues this job once more, where its owner may ask for that; else another job, after this one."""
    step = _reached(directory).step
    if kind.owner_may_requeue:
        # Said before it is done, because the scheduler ends this process with the job.
        print(f"{directory} goes on from step {step}: job {me.id} is queued again", flush=True)
        # It may be asked for again after no answer, too: there is only this one job to be queued again.
        try:
            _patiently(partial(kind.requeue, me.id), directory, is_repeatable=True)
        except (NoAnswer, ServerUnreached):
            raise
        except UserError as error:  # such as at a site where no job may be queued again
            raise UserError(
                f"{error} Job {me.id} is not queued again, so {_no_job_goes_on(directory)}"
            ) from error
        return
    # The training of this job has ended, so that a successor that waits for nothing does no harm.
    after = me.id if kind.can_be_waited_for(me.id) else None
    task = task_again(directory, {}, must_be_idle=False)
    try:
        [job_id] = _patiently(partial(queue_again, task, after), directory)
    except (NoAnswer, ServerUnreached):
        raise
    except UserError as error:
        if not task.has_no_successor:
            raise
        print(f"{directory} has stopped at step {step}: {task.how_to_go_on}. ({error})", flush=True)
        return
    print(f"{directory} goes on from step {step}: job {job_id} is queued", flush=True)
