"""What a run reports: on the console, in the records of the run directory, and in each rank's log file.

Every rank has a Reporter and calls it in the same way, so the training code need not ask which rank it is.
Only the Reporter of rank 0 writes the story of the run to the console, and the records. Other ranks show
only warnings and errors. story.py has the words, console.py brings log lines to the console and the files,
and display.py draws on the terminal.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar

from allranks.base import files, terminal
from allranks.base.processes import process_age_s
from allranks.base.text import printable
from allranks.data.loader import Data
from allranks.job import variables
from allranks.run import best as the_best
from allranks.run import checkpoint, metric_names
from allranks.run import directory as rundir
from allranks.runtime.runtime import Runtime
from allranks.training import story
from allranks.training.console import (
    Console,
    DisplayHandler,
    LogFile,
    Shown,
    is_for_other_ranks_console,
    is_for_rank_0s_console,
)
from allranks.training.display import DRAW_EVERY_S, Display, Moment, Pace, bar_text
from allranks.training.length import RunLength

if TYPE_CHECKING:
    from allranks.training.position import TrainingPosition

log = logging.getLogger("allranks")
Batch = TypeVar("Batch")

# So many log lines are kept in memory until the log file exists. A start makes a few dozen.
EARLY_RECORDS = 10_000


class Told(NamedTuple):
    """What a run reports of its configuration."""

    title: str  # which model is trained on which data, made by story.title()
    console: str  # "quiet", "normal" or "verbose"
    best: the_best.Rule  # which epoch is the best
    predicts: bool = False  # whether `allranks predict` can use the trained model
    is_tested: bool = True  # whether the trained model is evaluated on a test set at the end


class Reporter:
    """Reports one run on one rank, between open() and close()."""

    def __init__(self, runtime: Runtime, told: Told) -> None:
        self.runtime = runtime
        self.told = told
        self.directory: Path | None = None  # None until opened() is called
        self._display = Display(sys.stdout)  # only rank 0 writes to it
        # The progress bar. If stdout goes to a file, the bar may still be shown on stderr.
        self._bar = self._display if self._display.is_live else Display(sys.stderr)
        # opened() gives these their values.
        self._length = RunLength(epochs=0, steps=0, steps_per_epoch=0)
        self._table = story.Table(0, told.best.metric)
        self._header = ""  # the line above the table's columns as it was last shown
        self._batch_size = 0  # examples of one step over all ranks; 0: not known
        self._check: Callable[[], None] = lambda: None
        # metrics.jsonl, open to append to. None on other ranks than 0, and while it cannot be written.
        self._metrics: TextIO | None = None
        self._history: Sequence[Mapping[str, Any]] = ()
        self._best: Mapping[str, Any] | None = None  # the line of the best epoch so far
        # The first log lines are written before the run directory exists. They are kept here until opened()
        # can write them to the log file.
        self._early = logging.handlers.MemoryHandler(EARLY_RECORDS, flushLevel=logging.CRITICAL + 1)
        self._handlers: list[logging.Handler] = []

    def open(self) -> None:
        """Connects Python's logging with the console, and keeps all log lines for the log file."""
        is_verbose = self.told.console == "verbose"
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        log.setLevel(logging.DEBUG if is_verbose else logging.NOTSET)
        logging.captureWarnings(True)
        console: logging.Handler
        if self.runtime.is_main:
            console = DisplayHandler(self._display, shows_story=self.told.console != "quiet")
            console.addFilter(is_for_rank_0s_console)
        else:
            console = Console(sys.stderr)
            console.setFormatter(logging.Formatter(f"[{self._me()}] %(message)s"))
            console.addFilter(is_for_other_ranks_console)
            console.setLevel(logging.DEBUG if is_verbose else logging.WARNING)
        self._add(console)
        self._add(self._early)

    def close(self) -> None:
        """Closes the records and log files, and disconnects Python's logging. May be called twice."""
        self._bar.clear()
        if self._metrics is not None:
            # Some file systems tell only here that the disk is full. The other ranks must still be ended.
            with suppress(OSError):
                self._metrics.close()
        for handler in list(self._handlers):
            self._remove(handler)
            handler.close()
        log.setLevel(logging.NOTSET)

    # --- the story, from the beginning to one of its ends ---------------------------------------------

    def cell(self, place: str, overrides: Sequence[str], directory: str) -> None:
        """Says which cell of a sweep this run is. `place` is its number, such as `cell 3/12`."""
        self._say(f"{place}: {printable(' '.join(overrides))} in {directory}")

    def started(self) -> None:
        """Called when all ranks have started: says what is trained, and on how many ranks."""
        runtime = self.runtime
        hosts = len({facts.host_identity for facts in runtime.ranks})
        self._say(self.told.title, terminal.BOLD)
        self._pair(
            "ranks", story.who_trains(runtime.world_size, hosts, runtime.device.type, runtime.threads)
        )
        if runtime.world_size > 1:
            kind, collectives = runtime.kind, runtime.collectives
            how = story.how_they_work_together(runtime.identity.launcher, kind, collectives)
            self._pair("started by", how)
        log.debug(
            "%s: process %d on %s, connected after %.1f s",
            f"rank {runtime.rank} of {runtime.world_size}", os.getpid(), runtime.device, process_age_s(),
        )  # fmt: skip

    def data(self, data: Data) -> None:
        """Called when the data is open: says how many examples there are, and their shape."""
        sizes = story.examples(len(data.train), len(data.val), len(data.test), data.input_shape)
        self._pair("data", sizes)
        log.debug("the data is open after %.1f s", process_age_s())

    def opened(
        self,
        directory: str,
        position: TrainingPosition,
        facts: Mapping[str, str],
        length: RunLength,
        resumed: str | None,
        check: Callable[[], None],
        batch_size: int = 0,
    ) -> None:
        """Called when the run directory exists: logs and records are written there from now on.

        `facts` are lines of the story that only the training knows, by their labels. `length` says how long
        the whole run is, with 0 for what is not known yet. `batch_size` is the number of examples of one
        step over all ranks, for the progress bar, and 0 if that is not known. `resumed` is the checkpoint
        from which the run continues, None for a new run. `check` is called before a record is replaced; it
        raises UserError if another run has taken the directory. Raises UserError if the directory cannot be
        written.
        """
        self.directory = Path(directory)
        self._check = check
        self._history = position.history
        self._best = the_best.best_of(position.history, self.told.best)
        with rundir.writing(directory):
            if self.runtime.is_main:
                check()
                rundir.describe(directory, {**self.runtime.describe(), "epochs": length.epochs})
                self._metrics = self._all_metrics()
            # A path in a log line may have any bytes, and the locale's encoding may know few characters.
            file = LogFile(
                self.directory / "logs" / f"rank-{self.runtime.rank}.log",
                encoding="utf-8",
                errors="backslashreplace",
            )
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._early.setTarget(file)
        self._early.flush()
        self._remove(self._early)
        self._add(file)
        # The log of rank 0 begins with the story of the run. The logs of other ranks begin with this line.
        if not self.runtime.is_main:
            log.info("%s, rank %d of %d", self._me(), self.runtime.rank, self.runtime.world_size)
        self._batch_size = batch_size
        self._length = length
        self._table = story.Table(length.epochs, self.told.best.metric, position.history)
        for label, fact in facts.items():
            self._pair(label, fact)
        self._pair("directory", directory)
        if resumed:
            self._note_event("resumed", position, resumed)
            where = f"step {position.step}, in epoch {position.epoch + 1}"
            self._pair("resumed", f"going on from {resumed}: {where}")
        log.debug("the model is ready after %.1f s", process_age_s())

    def lengthened(self, epochs: int) -> None:
        """Called when a loop of the user's own has begun, and only now says how many epochs the run has."""
        self._length = self._length._replace(epochs=epochs)
        self._table.epochs = epochs

    def progress(
        self, batches: Iterable[Batch], position: TrainingPosition, steps: int | None
    ) -> Iterator[Batch]:
        """Yields the batches one by one, and shows a progress bar on rank 0's terminal.

        `position` says how far the training is. `steps` is the number of steps of the epoch; without it
        there is no bar.
        """
        if steps is None or not self._has_bar:
            return iter(batches)
        return self._with_bar(batches, position, steps)

    @property
    def _has_bar(self) -> bool:
        """Whether this rank shows a progress bar."""
        return self.runtime.is_main and self._bar.is_live and self.told.console != "quiet"

    def _with_bar(
        self, batches: Iterable[Batch], position: TrainingPosition, steps: int
    ) -> Iterator[Batch]:
        now_s = time.perf_counter()
        pace = Pace(position.epoch_steps, now_s)
        due_s = now_s
        for batch in batches:
            now_s = time.perf_counter()
            if now_s >= due_s:
                pace.note(position.epoch_steps, now_s)
                self._draw(self._moment(position, steps, pace.step_s))
                due_s = now_s + DRAW_EVERY_S
            yield batch
        self._bar.draw(f"  epoch {position.epoch + 1}/{self._length.epochs}  evaluating")

    def _moment(self, position: TrainingPosition, steps: int, step_s: float | None) -> Moment:
        """How far the training has come, for the progress bar.

        `step_s` is how many seconds a step takes now; None if that is not known yet.
        """
        epochs = self._length.epochs
        done = position.epoch_steps
        moment = Moment(position.epoch + 1, epochs, done, steps)
        if step_s is None or step_s == 0:
            return moment
        epoch_left_s = (steps - done) * step_s
        # The next epochs are assumed to take as long as the last one, including its evaluations. During the
        # first epoch only the time of its steps is known.
        last = position.history[-1] if position.history else None
        eval_s = last.get("time/eval_s", 0.0) if last else 0.0
        epoch_s = last["time/train_s"] + eval_s if last and "time/train_s" in last else steps * step_s
        epochs_left = epochs - position.epoch - 1
        return moment._replace(
            samples_per_s=self._batch_size / step_s if self._batch_size else None,
            epoch_left_s=epoch_left_s,
            run_left_s=epoch_left_s + eval_s + epochs_left * epoch_s,
        )

    def _draw(self, moment: Moment) -> None:
        bar = self._bar
        columns = bar.columns or terminal.USUAL_COLUMNS
        bar.draw(bar_text(moment, columns, bar.is_unicode, bar.shows_colours))

    def epoch(self, metrics: Mapping[str, float | int]) -> None:
        """Called when an epoch is trained and evaluated: records it, and shows it as a row of the table.

        `metrics` is the epoch's line of metrics.jsonl.
        """
        with self.runtime.progress.writing():
            if self.runtime.is_main:
                self._record_epoch(metrics)
            self._show_epoch(metrics)

    def _record_epoch(self, metrics: Mapping[str, float | int]) -> None:
        """Appends an epoch's line to metrics.jsonl."""
        try:
            if self._metrics is None:
                self._metrics = self._all_metrics()
            else:
                files.append_line(self._metrics, metrics)
        except OSError as error:
            # The next call writes the whole file anew, with the epochs that are missing in it.
            self._metrics = None
            log.warning("metrics.jsonl could not be written (%s); the training goes on", error)

    def _show_epoch(self, metrics: Mapping[str, float | int]) -> None:
        """Shows an epoch as a row of the table."""
        self._bar.clear()
        columns = self._display.columns
        self._table.add(metrics)
        header = self._table.header(columns)
        # The header is shown once, and again when the window's width or a new metric changes the columns.
        if header != self._header:
            is_first = not self._header
            self._header = header
            self._say(header, terminal.DIM, gap=True, is_row=True)
            if is_first:
                self._warn_of_missing_metric(metrics)
        self._best = the_best.best_of(
            [metrics] if self._best is None else [self._best, metrics], self.told.best
        )
        is_best = self._best is metrics
        style = (terminal.BOLD,) if is_best and self._display.shows_colours else ()
        self._say(self._table.row(metrics, is_best, columns), *style, is_row=True)
        is_last = metrics.get("epoch") == self._length.epochs
        if is_last and self.told.is_tested and self._has_bar:
            self._bar.draw("  evaluating on the test set")

    def _warn_of_missing_metric(self, metrics: Mapping[str, Any]) -> None:
        """Warns if `checkpoint.best` names a metric that the first line of this start does not have.

        It is not an error: a loop may evaluate only every fifth epoch. Without a val/loss the default has
        no effect, and nobody has asked for it.
        """
        rule = self.told.best
        is_missing = self._best is None and rule.metric not in metrics
        if self.runtime.is_main and is_missing and rule != the_best.BY_DEFAULT:
            what = the_best.missing(rule, metric_names.metrics_in([metrics]))
            log.warning(
                "%s=%s: %s No checkpoint is kept as the best before it comes.",
                the_best.KEY,
                rule.text,
                what,
            )

    # --- how it ends ----------------------------------------------------------------------------------

    def finished_before(self, directory: str) -> None:
        """Says that there is nothing to do, because an earlier start has finished this run."""
        self._close_story(f"{directory} holds this run, finished already: nothing to do")

    def interrupted(self) -> None:
        """Called when Ctrl-C has ended a run of a single process at once: says where it would continue.

        Nothing was saved at this moment.
        """
        if self.directory is None:
            return
        if checkpoint.steps(self.directory):
            log.warning("run.dir=%s goes on from the newest checkpoint there", self.directory)
        else:
            log.warning("nothing had been saved: run.dir=%s begins again", self.directory)

    def failed(self, message: str) -> None:
        """Called when this rank has an error, which ends all ranks. An empty `message` is not shown."""
        if message:
            # The console of the other ranks names them already.
            log.error(f"[{self._me()}] {message}" if self.runtime.is_main else message)

    def stopped(self, reason: str, position: TrainingPosition, command: str | None = None) -> None:
        """Called when all ranks have stopped and the training is saved: says where, and how to continue.

        `command` is how, in words; without it that is worked out for `allranks train` and its like.
        """
        with self.runtime.progress.writing():
            self._note_event("stopped", position, reason)
            self._tell_stopped(reason, position, command)

    def _tell_stopped(self, reason: str, position: TrainingPosition, command: str | None) -> None:
        """The end of the story of a run that has stopped: where it stands, and how it goes on."""
        self._bar.clear()
        epochs = self._length.epochs
        where = f"in epoch {position.epoch + 1} of {epochs}" if position.epoch < epochs else "in the test"
        self._close_story(
            f"stopped by {reason} after step {position.step}, {where}; it is saved: "
            f"run.dir={self.directory} goes on from there"
        )
        if command is None:
            command = self._command_to_go_on()
        self._pair("next", command, is_command=True)

    def _command_to_go_on(self) -> str:
        """How the user goes on with a stopped run of the shipped training."""
        identity = self.runtime.identity
        was_launched = bool(os.environ.get(variables.LAUNCH_ID))
        command = story.going_on(
            str(self.directory), sys.argv, self.runtime.world_size, identity.launcher, was_launched
        )
        # Imported here, so that the start of a rank does not take longer for it.
        from allranks.run.cells import JOB

        assert self.directory is not None
        if self.runtime.is_main and (self.directory / JOB).exists():
            command = story.going_on_in_a_job(str(self.directory))
        return command

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Called when the run is trained and tested: writes the records and says the result.

        Writes summary.json, and writes the whole metrics.jsonl once more, because single lines may be
        missing. Raises UserError if they cannot be written.
        """
        with self.runtime.progress.writing():
            if self.runtime.is_main:
                self._write_summary(summary)
            self._tell_result(summary)

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes metrics.jsonl and summary.json, on rank 0."""
        assert self.directory is not None
        with rundir.writing(str(self.directory)):
            if self._metrics is not None:
                self._metrics.close()
            self._metrics = self._all_metrics()
            files.write_json(self.directory / "summary.json", summary)

    def _tell_result(self, summary: Mapping[str, Any]) -> None:
        """The end of the story: what the run has come to, and where it is."""
        self._bar.clear()
        tested = story.test_figures(summary)
        if self.told.console == "quiet":
            self._close_story(f"test {tested}; in {self.directory}" if tested else f"in {self.directory}")
            return
        if tested:
            self._pair("test", tested, terminal.BOLD, gap=True)
        found = story.results(summary)
        if found:
            self._pair("result", found, terminal.BOLD, gap=not tested)
        if self._best is not None:
            self._pair("best", story.best_figures(self._best), gap=not (tested or found))
        total = terminal.duration(summary["time/total_s"])
        startup = terminal.duration(summary["time/startup_s"])
        self._pair("time", f"{total} in all, {startup} until the first step")
        self._pair("directory", str(self.directory))
        self._pair("next", story.using(str(self.directory), self.told.predicts), is_command=True)

    # --- tools ----------------------------------------------------------------------------------------

    def _note_event(self, event: str, position: TrainingPosition, why: str) -> None:
        """Appends a line to events.jsonl. `event` is "stopped" or "resumed"."""
        if not self.runtime.is_main:
            return
        assert self.directory is not None
        about = {
            "event": event,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": position.step,
            "epoch": position.epoch,
            "world_size": self.runtime.world_size,
            "why": why,
        }
        try:
            with (self.directory / "events.jsonl").open("a") as file:
                files.append_line(file, about)
        except OSError as error:
            log.warning("events.jsonl could not be written (%s); the run does not depend on it", error)

    def _all_metrics(self) -> TextIO:
        """Writes metrics.jsonl anew, with all epochs so far; returns the file, open to append to."""
        assert self.directory is not None
        self._check()  # another run may have taken the directory: its records must not be replaced
        known = "".join(map(files.line, self._history))
        return files.write_text(self.directory / "metrics.jsonl", known)

    def _say(self, text: str, *colours: str, gap: bool = False, is_row: bool = False) -> None:
        """Writes a line of the story to rank 0's log file and to its console. Other ranks do nothing.

        On the console a `gap` puts an empty line before it. A terminal shows it in these `colours`, and
        wraps it if it is too long, unless it is a row of a table.
        """
        if self.runtime.is_main:
            shown = Shown(gap=gap, colours=colours, wraps=not is_row)
            log.info("%s", text, extra={"shown": shown})

    def _pair(
        self, label: str, value: str, *colours: str, gap: bool = False, is_command: bool = False
    ) -> None:
        """Writes a line `label  value` of the story. A command is not wrapped, so that it can be copied."""
        if self.runtime.is_main:
            shown = Shown(gap=gap, label=label, colours=colours, wraps=not is_command)
            log.info("%s", story.pair(label, value), extra={"shown": shown})

    def _close_story(self, text: str) -> None:
        """Writes the line on the end of the run, which is shown even with console=quiet."""
        if self.runtime.is_main:
            log.info("%s", text, extra={"shown": Shown(is_last=True)})

    def _me(self) -> str:
        return f"rank {self.runtime.rank} on {self.runtime.host}"

    def _add(self, handler: logging.Handler) -> None:
        logging.getLogger().addHandler(handler)
        self._handlers.append(handler)

    def _remove(self, handler: logging.Handler) -> None:
        logging.getLogger().removeHandler(handler)
        self._handlers.remove(handler)
