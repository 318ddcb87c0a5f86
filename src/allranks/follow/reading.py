"""Reads from the files of runs how far they have come, on a login node and without disturbing the jobs.

A run writes its figures after each epoch (metrics.jsonl) and, if asked to, after some steps
(metrics-steps.jsonl). It writes nothing more often than that. So between two of these lines the progress is
estimated from the time that has passed. Any file may be missing or half written.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from allranks.base import files
from allranks.base.errors import UserError
from allranks.base.text import printable
from allranks.report.gather import EPOCH, RunFacts, as_whole, gather
from allranks.run.cells import JOB, METRICS, runs_below
from allranks.run.metric_names import as_number
from allranks.run.states import RunState, queue_states, states_of

STEPS = "metrics-steps.jsonl"
# A scheduler serves all users of a machine. So it is asked less often than the files are read.
ASK_EVERY_S = 30.0
# So much of the end of metrics-steps.jsonl is read: some 2,000 steps, more than a terminal has columns.
STEPS_BYTES = 1 << 18
RECENT_EPOCHS = 3  # whose times say how long the next ones will take


@dataclass(frozen=True)
class View:
    """What is known of one run at this moment. A field that is not known is None or empty."""

    directory: str
    name: str
    state: str  # finished, running, queued, stopped, ...; run/states.py explains them
    job_id: str | None = None
    epoch: int = 0  # completed epochs
    epochs: int | None = None  # of the whole run
    step: int | None = None  # the newest step that was recorded
    steps: int | None = None  # of the whole run
    share: float | None = None  # the part of the run that is done, from 0 to 1
    samples_per_s: float | None = None  # over all ranks, in the newest epoch
    left_s: float | None = None  # seconds until the last epoch is done
    # The metrics of the training, in the order for people: each as it was measured, epoch after epoch. None
    # stands for a value that is not finite.
    metrics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    step_losses: Sequence[float | None] = ()  # of the steps that were recorded
    of_steps: str = "loss"  # what these are: of a loop that records no loss of its steps, another figure
    best_epoch: int | None = None
    best_by: str = ""  # how it is chosen, such as `lowest val/loss`; empty without a best epoch
    tests: Mapping[str, float] = field(default_factory=dict)  # the figures over the test set
    results: Mapping[str, float] = field(default_factory=dict)  # what a program has found besides
    counts: str = "epoch"  # what a line of metrics.jsonl stands for; `step` in a loop without epochs
    ranks: int | None = None
    hosts: int | None = None
    problems: Sequence[str] = field(default=())  # a sentence for each file that cannot be read

    @property
    def is_running(self) -> bool:
        """Whether the run is training now, by its files or by what the scheduler says of its job."""
        return self.state.startswith("running")

    def newest(self, metric: str) -> float | None:
        """The value of a metric that was measured last; None if it is not finite, or there is none."""
        values = self.metrics.get(metric)
        return values[-1] if values else None

    def to_json(self) -> dict[str, Any]:
        """The view for programs, without the curves: metrics.jsonl has them."""
        left_out = ("metrics", "step_losses", "of_steps", "tests", "results", "best_by", "counts")
        values = {key: value for key, value in asdict(self).items() if key not in left_out}
        newest = {name: values[-1] for name, values in self.metrics.items()}
        return {
            **values,
            "train_loss": newest.get("train/loss"),
            "val_loss": newest.get("val/loss"),
            "val_accuracy": newest.get("val/accuracy"),
            "test_loss": self.tests.get("test/loss"),
            "test_accuracy": self.tests.get("test/accuracy"),
            "metrics": {**newest, **self.tests, **self.results},
            "problems": list(self.problems),
        }


class Reader:
    """Reads the runs at some paths, again and again. The schedulers are asked only now and then."""

    def __init__(self, paths: Sequence[str], warn: Callable[[str], None]) -> None:
        """`paths` are runs, sweeps or folders with runs in them.

        `warn` is called once for each sentence about something that cannot be read.
        """
        self.paths = paths
        self._warn = warn
        self._told: set[str] = set()
        self._finished: dict[Path, View] = {}  # finished runs change no more: they are read once
        self._asked_at: float | None = None
        self._asked_for: list[str] = []
        self._in_queue: dict[str, str] = {}

    def views(self) -> list[View]:
        """Reads every run and returns a view of each, sorted by directory within each path.

        Raises UserError if no run can be read. A single run that cannot be read only causes a warning.
        """
        found: list[Path] = []
        problems: list[UserError] = []
        for path in self.paths:
            try:
                found += runs_at(path)
            except UserError as error:
                problems.append(error)
        directories = _each_once(found)
        if not directories and problems:
            raise problems[0]
        for problem in problems:
            self._say(str(problem))

        open_ones = [directory for directory in directories if directory not in self._finished]
        states = states_of(open_ones, self._say, self._ask)
        views: list[View] = []
        unreadable: list[UserError] = []
        for directory in directories:
            try:
                view = self._finished.get(directory) or view_of(directory, states[directory])
            except UserError as error:
                unreadable.append(error)
                continue
            if view.state == "finished":
                self._finished[directory] = view
            views.append(view)
        if not views and unreadable:
            raise unreadable[0]
        for problem in unreadable:
            self._say(str(problem))
        return views

    def _say(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._warn(sentence)

    def _ask(self, jobs: Sequence[dict[str, Any]], warn: Callable[[str], None]) -> dict[str, str]:
        """The states of these jobs in their queues.

        The schedulers are asked again only after ASK_EVERY_S seconds, or if the jobs are other ones.
        """
        ids = [job_id for job in jobs for job_id in job["job_ids"]]
        now = time.monotonic()
        is_old = self._asked_at is None or now - self._asked_at >= ASK_EVERY_S
        if ids and (is_old or ids != self._asked_for):
            self._in_queue = queue_states(jobs, warn)
            self._asked_at = now
            self._asked_for = ids
        return self._in_queue


def _each_once(directories: Sequence[Path]) -> list[Path]:
    """The directories without those that are there under another name already: a link, another spelling."""
    by_place: dict[Path, Path] = {}
    for directory in directories:
        by_place.setdefault(directory.resolve(), directory)
    return list(by_place.values())


def runs_at(path: str) -> list[Path]:
    """The directories of the runs at a path, which is a run, a sweep, or a folder with runs in it.

    Raises UserError if there are none, or if the path is not a directory that can be read.
    """
    place = Path(path)
    try:
        is_missing = not place.exists()
        is_folder = place.is_dir()
        (place / METRICS).exists()  # whether the folder may be searched
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give the directory of a run, or a folder with runs "
            "in it."
        ) from error
    if is_missing:
        raise UserError(f"{path} is missing: give the directory of a run, or a folder with runs in it.")
    if not is_folder:
        raise UserError(f"{path} is a file: give the directory of a run, or a folder with runs in it.")
    found = sorted(runs_below(place))
    if not found:
        raise UserError(f"{path} holds no run: give the directory of a run, or a folder with runs in it.")
    return found


def view_of(directory: Path, state: RunState) -> View:
    """Reads the run in this directory. Raises UserError if nothing can be read there."""
    try:
        facts = gather(directory, state.words)
    except UserError:
        if not files.is_there(directory / JOB):
            raise
        # Only job.json is there: the job has not started, or it runs a program of the user's own.
        return View(str(directory), directory.name, state.words, state.job_id)

    problems = list(facts.problems)
    recorded = newest_steps(directory / STEPS)
    of_steps = _figure_of_steps(recorded)
    epochs = facts.epochs_planned
    done = facts.places[-1] if facts.epochs and facts.axis == EPOCH else 0
    steps = _steps_in_all(facts, done)
    step = max(
        (as_whole(line.get("step")) or 0 for line in [*facts.epochs[-1:], *recorded[-1:]]), default=None
    )
    epoch_s = _seconds_of_an_epoch(facts)
    left_s = _left_s(facts, state, done, epoch_s, directory)
    best = facts.best
    # The files may be anybody's: what is shown of them must not control the terminal.
    return View(
        directory=str(directory),
        name=printable(facts.name),
        state=state.words,
        job_id=state.job_id,
        epoch=done,
        epochs=epochs,
        step=step,
        steps=steps,
        share=_share(facts, state, done, step, steps, epoch_s, left_s),
        samples_per_s=facts.last("throughput/samples_per_s"),
        left_s=left_s,
        metrics={printable(name): _measured(facts, name) for name in facts.metrics},
        step_losses=[as_number(line.get(f"step/{of_steps}")) for line in recorded],
        of_steps=printable(of_steps),
        best_epoch=as_whole(best.get(EPOCH)) if best else None,
        best_by=printable(facts.rule.words) if best else "",
        tests={printable(name): value for name, value in facts.tests.items()},
        results={printable(name): value for name, value in facts.results.items()},
        counts=facts.axis,
        ranks=facts.world_size,
        hosts=len({rank.host for rank in facts.ranks}) or None,
        problems=problems,
    )


def _figure_of_steps(recorded: Sequence[Mapping[str, Any]]) -> str:
    """The figure of single steps that is drawn: the loss, or else the first one that was recorded."""
    names = dict.fromkeys(key for line in recorded for key in line if key.startswith("step/"))
    others = [name.removeprefix("step/") for name in names if name != "step/lr"]
    return "loss" if "loss" in others or not others else others[0]


def _measured(facts: RunFacts, metric: str) -> list[float | None]:
    """The values of a metric in the lines that have it; None if it is not finite.

    A loop may measure it after every fifth epoch only.
    """
    return [line[metric] for line in facts.epochs if metric in line]


def newest_steps(path: Path) -> list[dict[str, Any]]:
    """The newest complete lines of metrics-steps.jsonl; an empty list if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            begins_at = max(file.tell() - STEPS_BYTES, 0)
            file.seek(begins_at)
            content = file.read()
    except OSError:
        return []
    # The last line may be half written. If the beginning of the file was skipped, the first line is cut.
    whole = content[: content.rfind(b"\n") + 1].splitlines()[1 if begins_at else 0 :]
    found = []
    for line in whole:
        with suppress(ValueError, RecursionError):
            about = json.loads(line)
            if isinstance(about, dict):
                found.append(about)
    return found


def _steps_in_all(facts: RunFacts, done: int) -> int | None:
    """The number of optimizer steps of the whole run; None if it cannot be told yet."""
    limit = as_whole(facts.config.get("trainer.max_steps"))
    epochs = facts.epochs_planned
    of_epoch = None
    if done and facts.epochs[-1].get("step"):
        of_epoch = facts.epochs[-1]["step"] / done
    else:
        of_epoch = _steps_by_config(facts.config, facts.world_size)
    if of_epoch is None or epochs is None:
        return limit
    planned = round(of_epoch * epochs)
    return planned if limit is None else min(limit, planned)


def _steps_by_config(config: Mapping[str, Any], world_size: int | None) -> float | None:
    """The number of steps of an epoch, computed from the configuration; None if it does not tell that."""
    split = config.get("data.split")
    per_rank = as_whole(config.get("trainer.per_rank_batch_size"))
    batch = as_whole(config.get("trainer.batch_size"))
    if per_rank is not None:
        batch = per_rank * world_size if world_size else None
    examples = as_whole(split[0]) if isinstance(split, list) and split else None
    if not batch or not examples:
        return None
    return math.ceil(examples / batch)


def _seconds_of_an_epoch(facts: RunFacts) -> float | None:
    """The mean time of the newest epochs, including their evaluations; None before the first epoch."""
    times = [
        epoch["time/train_s"] + (epoch.get("time/eval_s") or 0.0)
        for epoch in facts.epochs[-RECENT_EPOCHS:]
        if epoch.get("time/train_s") is not None
    ]
    return sum(times) / len(times) if times else None


def _left_s(
    facts: RunFacts, state: RunState, done: int, epoch_s: float | None, directory: Path
) -> float | None:
    """The estimated seconds until the run's last epoch is done; None if the run is not running.

    It assumes that each epoch takes `epoch_s` seconds. Without that it is None, too.
    """
    epochs = facts.epochs_planned
    if epoch_s is None or epochs is None or not state.words.startswith("running"):
        return None
    # The time since the last epoch was recorded. It compares the clock of this host with that of the file
    # server, which may differ by some seconds.
    try:
        since_s = time.time() - (directory / METRICS).stat().st_mtime
    except OSError:  # the file is gone, because the run is just replacing it
        return None
    into_epoch_s = min(max(since_s, 0.0), epoch_s)
    return max((epochs - done) * epoch_s - into_epoch_s, 0.0)


def _share(
    facts: RunFacts,
    state: RunState,
    done: int,
    step: int | None,
    steps: int | None,
    epoch_s: float | None,
    left_s: float | None,
) -> float | None:
    """The part of the run that is done, from 0 to 1; None if the number of epochs is not known.

    While the run is running it is estimated from the time that is left, else from the newest record.
    """
    epochs = facts.epochs_planned
    if state.words == "finished":
        return 1.0
    if not epochs:
        return None
    by_records = step / steps if step is not None and steps else done / epochs
    if not epoch_s or left_s is None:  # epochs that took no time tell nothing of the time that is left
        return by_records
    return min(max(by_records, 1 - left_s / (epochs * epoch_s)), 1.0)
