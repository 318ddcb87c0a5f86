"""`allranks runs` and `allranks cancel`: what became of runs and their jobs, and an end to these."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from allranks.base.errors import EXIT_REQUEUE, UserError
from allranks.base.text import table
from allranks.job import scheduler
from allranks.run import directory as rundir
from allranks.run.cells import CELLS, JOB, is_finished, read_job, text_of

TERMINATED = str(128 + signal.SIGTERM)  # by the scheduler: at the walltime, or cancelled


def listed(root: str, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every run below `root`: state, job id, epochs, validation accuracy, directory."""
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
    now: dict[str, str] = {}
    for name in sorted({str(job["scheduler"]) for job in jobs.values() if job}):
        ids = [
            job_id
            for directory, job in jobs.items()
            if job and job["scheduler"] == name and not is_finished(directory)
            for job_id in job["job_ids"]
        ]
        try:
            now |= scheduler.named(name).states(ids)
        except UserError as error:  # what is in the directories can be shown all the same
            warn(str(error))
            now |= dict.fromkeys(ids, "not known")
    return [_row(directory, jobs[directory], now) for directory in found]


def _below(root: str) -> Iterator[Path]:
    """The runs' directories; a folder that vanishes meanwhile, as checkpoints do, is passed over."""
    for folder, below, names in os.walk(root):
        if (rundir.CONFIG in names or JOB in names) and CELLS not in names:
            below.clear()
            yield Path(folder)


def _row(directory: Path, job: dict[str, Any], now: dict[str, str]) -> dict[str, Any]:
    lines = text_of(directory / "metrics.jsonl").splitlines()
    last: dict[str, Any] = {}
    with suppress(ValueError, IndexError, TypeError):  # no line yet, or half of one
        last = dict(json.loads(lines[-1]))
    ids = job.get("job_ids", [])
    alive = next((job_id for job_id in ids if job_id in now), None)
    code = text_of(directory / "exit_code")
    if is_finished(directory):
        state = "finished"
    elif alive:
        state = now[alive]
    elif code not in ("", "0", TERMINATED, str(EXIT_REQUEUE)):
        state = f"failed ({code})"
    else:  # without a job nobody knows whether its process is still there
        state = "ended early" if job else "not finished"
    return {
        "state": state,
        "job_id": alive or (ids[-1] if ids else None),
        "epochs": len(lines),
        "val/accuracy": last.get("val/accuracy"),
        "directory": str(directory),
    }


def cancelled(run: str) -> list[str]:
    """Ends the jobs of a run directory, of a sweep's, or of a cell's; their ids.

    A sweep's jobs are its array and the jobs of cells that have gone on, each in a job of its own.
    """
    job = read_job(Path(run) / JOB)
    if not job:
        raise UserError(f"{run} has no {JOB}: give the directory of a run that `allranks submit` queued.")
    kind, ids = scheduler.named(job["scheduler"]), list(job["job_ids"])
    # Slurm lists the jobs of an array, PBS the array itself.
    in_array: dict[str, str] = {}
    for record in sorted(Path(run).glob(f"*/{JOB}")):
        index, of_cell = record.parent.name, read_job(record).get("job_ids", [])
        members = (
            {kind.job_of_array(array, int(index)): array for array in ids} if index.isdecimal() else {}
        )
        in_array |= {job_id: members[job_id] for job_id in of_cell if job_id in members}
        ids += [job_id for job_id in of_cell if job_id not in members and job_id not in ids]
    if not ids:
        raise UserError(f"{run}: the scheduler has told no id for its job. Look for it in the queue.")
    there = kind.states([*ids, *in_array])
    arrays = {in_array[job_id] for job_id in there if job_id in in_array}
    alive = [job_id for job_id in ids if job_id in there or job_id in arrays]
    if not alive:
        raise UserError(f"{run}: {', '.join(ids)} has ended already. `allranks runs` shows how it went.")
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
    header = ("state", "job", "epochs", "val/accuracy", "directory")
    cells = [
        (r["state"], r["job_id"] or "-", str(r["epochs"]),
         "-" if r["val/accuracy"] is None else f"{r['val/accuracy']:.2f} %", r["directory"])
        for r in found
    ]  # fmt: skip
    print(table([header, *cells]))
    return 0


def cancel(arguments: Sequence[str]) -> int:
    """`allranks cancel RUN`; the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="allranks cancel", description="ends a run's jobs")
    parser.add_argument("run", metavar="RUN", help="a run's directory, a sweep's, or one cell's")
    args = parser.parse_args(arguments)
    print(f"cancelled {', '.join(cancelled(args.run))} of {args.run}")
    return 0
