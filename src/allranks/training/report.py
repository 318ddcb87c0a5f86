"""What a run tells: on the console, in the records of the run directory, and in each rank's log file.

Every rank has a Reporter, so that nobody needs to ask which rank it is. Only rank 0's writes to the console
and to the records; the others show warnings and errors. The words are in story.py, and display.py knows
what a terminal takes.
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
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from allranks.base import files, processes, terminal
from allranks.base.text import printable
from allranks.data.dealing import Batch
from allranks.data.loader import Data
from allranks.job import variables
from allranks.run import checkpoint
from allranks.run import directory as rundir
from allranks.runtime.runtime import Runtime
from allranks.training import story
from allranks.training.display import DRAW_EVERY_S, Display, Moment, Pace, bar_text
from allranks.training.length import RunLength

if TYPE_CHECKING:
    from allranks.training.training import Training

log = logging.getLogger("allranks")

EARLY_RECORDS = 10_000  # log lines kept until there is a log file; a start makes a few dozen


class Told(NamedTuple):
    """What a run tells of its configuration."""

    title: str  # what is trained on what, as story.title() puts it
    precision: str  # of the model's arithmetic
    console: str  # "quiet", "normal" or "verbose"


class Reporter:
    """One rank's report of one run, between open() and close()."""

    def __init__(self, runtime: Runtime, told: Told) -> None:
        self.runtime = runtime
        self.told = told
        self.directory: Path | None = None  # until the run directory is there
        self._display = Display(sys.stdout)  # rank 0's
        self._bar = self._display if self._display.is_live else Display(sys.stderr)
        # From opened() on.
        self._length = RunLength(epochs=0, steps=0, steps_per_epoch=0)
        self._table = story.Table(0)
        self._header = ""  # the line above the table's columns as it was shown last
        self._batch_size = 0  # examples of one step over all ranks
        self._check: Callable[[], None] = lambda: None
        self._metrics: TextIO | None = None  # metrics.jsonl; rank 0's, while it can be written
        self._history: Sequence[Mapping[str, Any]] = ()
        self._best: Mapping[str, Any] | None = None  # the epoch with the lowest val/loss so far
        # Log lines come before the run directory does: they are kept, and go to the log file then.
        self._early = logging.handlers.MemoryHandler(EARLY_RECORDS, flushLevel=logging.CRITICAL + 1)
        self._handlers: list[logging.Handler] = []

    def open(self) -> None:
        """From now on this rank's log lines are shown, or kept for its log file."""
        is_verbose = self.told.console == "verbose"
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        log.setLevel(logging.DEBUG if is_verbose else logging.NOTSET)
        logging.captureWarnings(True)
        console: logging.Handler
        if self.runtime.is_main:
            console = _DisplayHandler(self._display, shows_story=self.told.console != "quiet")
            console.addFilter(_is_for_rank_0s_console)
        else:
            console = _Console(sys.stderr)
            console.setFormatter(logging.Formatter(f"[{self._me()}] %(message)s"))
            console.addFilter(_is_for_other_ranks_console)
            console.setLevel(logging.DEBUG if is_verbose else logging.WARNING)
        self._add(console)
        self._add(self._early)

    def close(self) -> None:
        """Closes records and logs, and takes them out of Python's logging. May be called twice."""
        self._bar.clear()
        if self._metrics is not None:
            self._metrics.close()
        for handler in list(self._handlers):
            self._remove(handler)
            handler.close()
        log.setLevel(logging.NOTSET)

    # --- the story, from the beginning to one of its ends ---------------------------------------------

    def cell(self, place: str, overrides: Sequence[str], directory: str) -> None:
        """This run is a cell of a sweep, such as `cell 3/12`."""
        self._say(f"{place}: {printable(' '.join(overrides))} in {directory}")

    def started(self) -> None:
        """The ranks have come up: says what is trained, how many ranks train where, and by what means."""
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
        """The data is open: says how many examples there are, and of which shape."""
        sizes = story.examples(len(data.train), len(data.val), len(data.test), data.input_shape)
        self._pair("data", sizes)
        log.debug("the data is open after %.1f s", process_age_s())

    def opened(
        self,
        directory: str,
        training: Training,
        batch_size: int,
        length: RunLength,
        resumed: str | None,
        check: Callable[[], None],
    ) -> None:
        """The run directory is there: logs and records go to it from now on.

        `batch_size`: examples of one step over all ranks; `length`: of the whole run. `resumed` is the
        checkpoint that the run goes on from. `check` raises UserError where another run has taken the
        directory; it is called before a record is replaced.
        """
        self.directory = Path(directory)
        self._check = check
        self._history = training.history
        self._best = story.best_of(training.history)
        with rundir.writing(directory):
            if self.runtime.is_main:
                check()
                rundir.describe(directory, self.runtime.describe())
                self._metrics = self._all_metrics()
            file = _LogFile(self.directory / "logs" / f"rank-{self.runtime.rank}.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._early.setTarget(file)
        self._early.flush()
        self._remove(self._early)
        self._add(file)
        if not self.runtime.is_main:  # rank 0's log begins with its story
            log.info("%s, rank %d of %d", self._me(), self.runtime.rank, self.runtime.world_size)
        self._batch_size = batch_size
        self._length = length
        self._table = story.Table(length.epochs)
        self._pair("model", f"{training.parameters:,} parameters, trained in {self.told.precision}")
        self._pair(
            "batch",
            f"{batch_size:,} over all ranks, {story.count(length.steps_per_epoch, 'step')} an epoch",
        )
        self._pair("directory", directory)
        if resumed:
            self._note_event("resumed", training, resumed)
            where = f"step {training.step}, in epoch {training.epoch + 1}"
            self._pair("resumed", f"going on from {resumed}: {where}")
        log.debug("the model is ready after %.1f s", process_age_s())

    def progress(
        self, batches: Iterable[list[Batch]], training: Training, steps: int
    ) -> Iterator[list[Batch]]:
        """Gives the batches one by one, and shows a progress bar on rank 0's terminal."""
        if not self._has_bar:
            return iter(batches)
        return self._with_bar(batches, training, steps)

    @property
    def _has_bar(self) -> bool:
        """Whether this rank shows a progress bar."""
        return self.runtime.is_main and self._bar.is_live and self.told.console != "quiet"

    def _with_bar(
        self, batches: Iterable[list[Batch]], training: Training, steps: int
    ) -> Iterator[list[Batch]]:
        now_s = time.perf_counter()
        pace = Pace(training.epoch_steps, now_s)
        due_s = now_s
        for batch in batches:
            now_s = time.perf_counter()
            if now_s >= due_s:
                pace.note(training.epoch_steps, now_s)
                self._draw(self._moment(training, steps, pace.step_s))
                due_s = now_s + DRAW_EVERY_S
            yield batch
        self._bar.draw(f"  epoch {training.epoch + 1}/{self._length.epochs}  evaluating")

    def _moment(self, training: Training, steps: int, step_s: float | None) -> Moment:
        """Where the training stands, for the bar. `step_s`: what a step takes now, if that is known."""
        epochs = self._length.epochs
        done = training.epoch_steps
        moment = Moment(training.epoch + 1, epochs, done, steps)
        if step_s is None or step_s == 0:
            return moment
        epoch_left_s = (steps - done) * step_s
        # An epoch takes as long as the last one, with its evaluations; the first only says what steps take.
        last = training.history[-1] if training.history else None
        eval_s = last["time/eval_s"] if last else 0.0
        epoch_s = last["time/train_s"] + eval_s if last else steps * step_s
        epochs_left = epochs - training.epoch - 1
        return moment._replace(
            samples_per_s=self._batch_size / step_s,
            epoch_left_s=epoch_left_s,
            run_left_s=epoch_left_s + eval_s + epochs_left * epoch_s,
        )

    def _draw(self, moment: Moment) -> None:
        bar = self._bar
        columns = bar.columns or terminal.USUAL_COLUMNS
        bar.draw(bar_text(moment, columns, bar.is_unicode, bar.shows_colours))

    def epoch(self, metrics: Mapping[str, float | int]) -> None:
        """One more epoch is trained and evaluated: `metrics` is its line of metrics.jsonl."""
        if self.runtime.is_main:
            try:
                if self._metrics is None:
                    self._metrics = self._all_metrics()
                else:
                    files.append_line(self._metrics, metrics)
            except OSError as error:
                self._metrics = None  # all of it is written anew as soon as that is possible
                log.warning("metrics.jsonl could not be written (%s); the training goes on", error)
        self._bar.clear()
        columns = self._display.columns
        header = self._table.header(columns)
        if header != self._header:  # also where the window has become narrower
            self._header = header
            self._say(header, terminal.DIM, gap=True, is_row=True)
        self._best = story.best_of([metrics] if self._best is None else [self._best, metrics])
        is_best = self._best is metrics
        style = (terminal.BOLD,) if is_best and self._display.shows_colours else ()
        self._say(self._table.row(metrics, is_best, columns), *style, is_row=True)
        if metrics["epoch"] == self._length.epochs and self._has_bar:
            self._bar.draw("  evaluating on the test set")

    # --- how it ends ----------------------------------------------------------------------------------

    def finished_before(self, directory: str) -> None:
        """An earlier start has finished this run: says that nothing is left to do."""
        self._close_story(f"{directory} holds this run, finished already: nothing to do")

    def interrupted(self) -> None:
        """Ctrl-C has ended a lone process at once, without a save."""
        if self.directory is None:
            return
        if checkpoint.steps(self.directory):
            log.warning("run.dir=%s goes on from the newest checkpoint there", self.directory)
        else:
            log.warning("nothing had been saved: run.dir=%s begins again", self.directory)

    def failed(self, message: str) -> None:
        """This rank alone has met an error, and all ranks end. Nothing is said where `message` is empty."""
        if message:
            # The console of the other ranks names them already.
            log.error(f"[{self._me()}] {message}" if self.runtime.is_main else message)

    def stopped(self, reason: str, training: Training) -> None:
        """All ranks have agreed to stop, and the training is saved: says where, and how it goes on."""
        self._bar.clear()
        self._note_event("stopped", training, reason)
        epochs = self._length.epochs
        where = f"in epoch {training.epoch + 1} of {epochs}" if training.epoch < epochs else "in the test"
        self._close_story(
            f"stopped by {reason} after step {training.step}, {where}; it is saved: "
            f"run.dir={self.directory} goes on from there"
        )
        identity = self.runtime.identity
        was_launched = bool(os.environ.get(variables.LAUNCH_ID))
        command = story.going_on(
            str(self.directory), sys.argv, self.runtime.world_size, identity.launcher, was_launched
        )
        from allranks.run.cells import JOB  # the start of a rank does without

        assert self.directory is not None
        if self.runtime.is_main and (self.directory / JOB).exists():
            command = story.going_on_in_a_job(str(self.directory))
        self._pair("next", command, is_command=True)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is trained and tested. Writes summary.json, and metrics.jsonl whole once more."""
        if self.runtime.is_main:
            assert self.directory is not None
            with rundir.writing(str(self.directory)):
                if self._metrics is not None:
                    self._metrics.close()
                self._metrics = self._all_metrics()
                files.write_json(self.directory / "summary.json", summary)
        self._bar.clear()
        if self.told.console == "quiet":
            self._close_story(f"test {story.test_figures(summary)}; in {self.directory}")
            return
        self._pair("test", story.test_figures(summary), terminal.BOLD, gap=True)
        if self._best is not None:
            self._pair("best", story.best_figures(self._best))
        total, startup = (terminal.duration(summary[f"time/{key}_s"]) for key in ("total", "startup"))
        self._pair("time", f"{total} in all, {startup} until the first step")
        self._pair("directory", str(self.directory))
        self._pair("next", story.using(str(self.directory)), is_command=True)

    # --- tools ----------------------------------------------------------------------------------------

    def _note_event(self, event: str, training: Training, why: str) -> None:
        """Appends a line to events.jsonl: the run was stopped, or goes on from a checkpoint."""
        if not self.runtime.is_main:
            return
        assert self.directory is not None
        about = {
            "event": event,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": training.step,
            "epoch": training.epoch,
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
        self._check()  # what is there may be another run's by now
        known = "".join(map(files.line, self._history))
        return files.write_text(self.directory / "metrics.jsonl", known)

    def _say(self, text: str, *colours: str, gap: bool = False, is_row: bool = False) -> None:
        """A line of rank 0's story, in its log file as it is.

        On the console `colours` hold at a terminal, an empty line stands before it if there is a `gap`, and
        long lines are wrapped at a terminal unless they are a row of a table.
        """
        if self.runtime.is_main:
            shown = _Shown(gap=gap, colours=colours, wraps=not is_row)
            log.info("%s", text, extra={"shown": shown})

    def _pair(
        self, label: str, value: str, *colours: str, gap: bool = False, is_command: bool = False
    ) -> None:
        """A line `label  value` of the story; a command is not wrapped, so that it can be copied."""
        if self.runtime.is_main:
            shown = _Shown(gap=gap, label=label, colours=colours, wraps=not is_command)
            log.info("%s", story.pair(label, value), extra={"shown": shown})

    def _close_story(self, text: str) -> None:
        """The one line that is shown of a run's end even with console=quiet."""
        if self.runtime.is_main:
            log.info("%s", text, extra={"shown": _Shown(is_last=True)})

    def _me(self) -> str:
        return f"rank {self.runtime.rank} on {self.runtime.host}"

    def _add(self, handler: logging.Handler) -> None:
        logging.getLogger().addHandler(handler)
        self._handlers.append(handler)

    def _remove(self, handler: logging.Handler) -> None:
        logging.getLogger().removeHandler(handler)
        self._handlers.remove(handler)


def _is_for_rank_0s_console(record: logging.LogRecord) -> bool:
    return record.name.startswith("allranks") or record.levelno >= logging.WARNING


def _is_for_other_ranks_console(record: logging.LogRecord) -> bool:
    # Python's own warnings come on every rank alike: rank 0 shows them.
    return record.name != "py.warnings" and (
        record.levelno >= logging.WARNING or record.name.startswith("allranks")
    )


class _Shown(NamedTuple):
    """How a line of the story looks on the console."""

    gap: bool = False  # an empty line stands before it
    label: str = ""  # with which it begins
    colours: Sequence[str] = ()  # at a terminal
    wraps: bool = True  # at a terminal
    is_last: bool = False  # it is shown with console=quiet, too


class _Console(logging.StreamHandler):
    """A stream that may be closed or full while the training goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """`| head` closes the console, a disk is full: no reason to complain, or to stop training."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _DisplayHandler(_Console):
    """Shows log lines on rank 0's console: the story, and what other modules have to say."""

    def __init__(self, display: Display, shows_story: bool) -> None:
        """Without `shows_story` only warnings, errors and the last line are shown."""
        super().__init__(display.stream)
        self.display = display
        self.shows_story = shows_story

    def emit(self, record: logging.LogRecord) -> None:
        shown: _Shown = getattr(record, "shown", _Shown())
        if record.levelno < logging.WARNING and not (self.shows_story or shown.is_last):
            return
        try:
            self.display.write_line(self._text(self.format(record), record.levelno, shown))
        except OSError:
            self.handleError(record)

    def _text(self, text: str, level: int, shown: _Shown) -> str:
        """The line as the console shows it."""
        columns = self.display.columns
        if columns is not None and shown.wraps:
            indent = story.pair("", "") if shown.label else "  "
            text = terminal.wrapped(text, min(columns, terminal.MOST_COLUMNS), indent)
        if self.display.shows_colours:
            text = _coloured(text, level, shown)
        return f"\n{text}" if shown.gap else text


def _coloured(text: str, level: int, shown: _Shown) -> str:
    if level >= logging.WARNING:
        return terminal.painted(text, terminal.RED if level >= logging.ERROR else terminal.YELLOW)
    if shown.label:
        label, value = text[: story.VALUE_AT], text[story.VALUE_AT :]
        return terminal.painted(label, terminal.DIM) + (
            terminal.painted(value, *shown.colours) if shown.colours else value
        )
    return terminal.painted(text, *shown.colours) if shown.colours else text


class _LogFile(_Console, logging.FileHandler):
    """logs/rank-N.log, which somebody may remove, and whose disk may be full."""

    def _open(self) -> TextIOWrapper:
        try:
            return super()._open()
        except FileNotFoundError:  # somebody has tidied up
            Path(self.baseFilename).parent.mkdir(exist_ok=True)
            return super()._open()

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def process_age_s() -> float:
    """Seconds since this process started, imports included."""
    stat = processes.process_stat(os.getpid())
    try:
        with open("/proc/uptime") as file:  # noqa: PTH123
            host_up_s = float(file.read().split()[0])
    except OSError:
        stat = None
    if stat is None:  # no /proc: count from the first import of this module
        return time.perf_counter() - _IMPORTED
    return host_up_s - stat.started_ticks / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.perf_counter()
