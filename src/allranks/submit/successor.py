"""`allranks submit --next`: after a job has stopped in order, the job that goes on."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from allranks.base.errors import EXIT_REQUEUE, EXIT_STUCK, UserError
from allranks.job import scheduler
from allranks.run import checkpoint
from allranks.run.cells import JOB, is_finished, read_job
from allranks.submit.queue import enqueue


def go_on(parser: argparse.ArgumentParser, directory: str) -> int:
    """After a job has stopped in order: the next one, or none; the exit code for its script.

    A file in the run directory keeps it to one successor, and has the step that the run had come to.
    """
    job, me = read_job(Path(directory) / JOB), scheduler.this_job(os.environ)
    if not job or me is None:
        raise UserError(f"--next {directory} is for the script of a job that `allranks submit` has queued.")
    kind, ids = str(job["scheduler"]), [str(job_id) for job_id in job["job_ids"]]
    mine = next((i for i, job_id in enumerate(ids) if job_id.split(".")[0] == me.split(".")[0]), len(ids))
    if is_finished(directory):
        try:
            if later := scheduler.states(kind, ids[mine + 1 :]):
                scheduler.cancel(kind, list(later)[::-1])
                print(f"finished: {', '.join(later)} cancelled", flush=True)
        except UserError as error:  # they will find that there is nothing left to do
            print(f"allranks: {error}", file=sys.stderr, flush=True)
        return 0
    later = scheduler.states(kind, ids[mine + 1 :])
    if later or job["program"] or job["order"].get("chain"):
        goes_on = f"job {next(iter(later))} goes on" if later else "this was the last job of it"
        print(f"{directory} is not finished: {goes_on}", flush=True)
        return EXIT_REQUEUE
    before = max((int(path.read_text() or 0) for path in Path(directory).glob(".next-*")), default=-1)
    step = max(checkpoint.steps(directory), default=0)
    mark = Path(directory) / f".next-{me}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    try:
        with mark.open("x") as file:
            file.write(str(step))
    except FileExistsError:
        return EXIT_REQUEUE
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
    if kind == "slurm":
        print(f"{directory} goes on from step {step}: job {me} is queued again", flush=True)
        scheduler.requeue(me)
    else:
        args = parser.parse_args(["--cell", directory, "--next", directory])
        # PBS takes no dependency on one job of an array, and the training of this one has ended
        args.after = None if "[" in me else me
        enqueue(args, [])
    return EXIT_REQUEUE


class RunStuck(UserError):
    code = EXIT_STUCK
