"""`allranks runs` lists runs, and says what became of them; `allranks cancel` ends the jobs of one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError, show
from allranks.base.text import as_text, table
from allranks.job import scheduler
from allranks.job.scheduler import Scheduler
from allranks.run import metric_names
from allranks.run.cells import JOB, read_job, runs_below
from allranks.run.results import Figures, figures, headings, is_whole, overrides_of
from allranks.run.states import RunState, states_of


def listed(root: str, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every run below `root`: its state, job, epochs, metrics, directory and overrides.

    `warn` is called with a sentence for each record that cannot be read. Raises UserError if `root` is
    no folder.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root} is no folder: give one with runs in it. The default is ./runs.")
    states = states_of(sorted(runs_below(root)), warn)
    return [_row(directory, state, warn) for directory, state in states.items()]


def _row(directory: Path, state: RunState, warn: Callable[[str], None]) -> dict[str, Any]:
    """What is shown of a run; `warn` is told of its records that cannot be read."""
    come_to = Figures(0, {}, {})
    summary = directory / "summary.json"
    try:
        come_to = figures(directory)
        if not come_to.tests and not is_whole(summary):
            warn(f"{as_text(str(summary))} cannot be read: it is not a JSON object.")
    except OSError as error:  # the files of another user, perhaps
        warn(f"{as_text(str(error.filename))} cannot be read ({error.strerror}).")
    try:
        overrides = overrides_of(directory)
    except UserError:  # it has been said that its job.json cannot be read
        overrides = []
    return {
        "state": state.words,
        "job_id": state.job_id,
        "epochs": come_to.epochs,
        "val/accuracy": come_to.metrics.get("val/accuracy"),
        "test/accuracy": come_to.tests.get("test/accuracy"),
        "metrics": {**come_to.metrics, **come_to.tests},
        "directory": str(directory),
        "overrides": overrides,
    }


@dataclass(frozen=True)
class Jobs:
    """The jobs of a run, or of a sweep and of its cells."""

    # The jobs that can be ended: those of the run or the sweep itself, and those in which single cells went
    # on.
    ids: Sequence[str]
    array_of: Mapping[str, str]  # from the id of each job of an array to the id of the array

    def alive(self, there: Collection[str]) -> list[str]:
        """Those of `ids` that are in the queue. `there` are the ids that the scheduler lists.

        PBS lists an array under the array's own id, Slurm lists each job of the array.
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
    """Ends the jobs of a run, of a sweep, or of a cell, given its directory. Returns the jobs' ids.

    A sweep's jobs are its array, and those by which cells have gone on. Raises UserError if there is
    nothing to end.
    """
    if not run:  # as of a shell's variable that is not set; Python takes it for the present directory
        raise UserError("RUN is empty: give the directory of a run.")
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
    parser = argparse.ArgumentParser(
        prog="allranks runs",
        description="Lists the runs below a folder, with what has become of them and of their jobs.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "root", nargs="?", default="runs", metavar="DIR", help="the folder; default: ./runs"
    )
    parser.add_argument("--json", action="store_true", help="for programs: one JSON line a run")
    args = with_our_errors(parser).parse_args(arguments)
    found = listed(args.root, show)
    if args.json:
        print("".join(json.dumps(row) + "\n" for row in found), end="")
        return 0
    if not found:
        raise UserError(f"{args.root} holds no run: give a folder with runs in it. The default is ./runs.")
    figures_of = [_figures_of(row) for row in found]
    header = ("state", "job", *headings(figures_of), "directory", "overrides")
    cells = []
    for row, come_to in zip(found, figures_of, strict=True):
        words = " ".join(row["overrides"])
        directory = as_text(row["directory"])
        cells.append((row["state"], row["job_id"] or "-", *come_to.columns(), directory, words))
    print(table([header, *cells]))
    return 0


def _figures_of(row: Mapping[str, Any]) -> Figures:
    """The figures in a row that listed() has made."""
    tests = {name: value for name, value in row["metrics"].items() if metric_names.part_of(name) == "test"}
    others = {name: value for name, value in row["metrics"].items() if name not in tests}
    return Figures(row["epochs"], others, tests)


def cancel(arguments: Sequence[str]) -> int:
    """`allranks cancel RUN`; the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="allranks cancel",
        description="Ends the jobs that `allranks submit` has queued for a run, whether they wait or run.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="the directory of a run, of a sweep, or of one cell of it"
    )
    args = with_our_errors(parser).parse_args(arguments)
    print(f"cancelled {', '.join(cancelled(args.run))} of {args.run}")
    return 0
