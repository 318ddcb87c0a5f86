"""Keeps trackers up to date without making the training wait for them.

Trackers follow the records of the run: the lines of metrics-steps.jsonl, and the metrics of all epochs.
Each tracker has a thread of its own. The thread knows how far its tracker has got, and hands it what comes
after that. So a tracker that is slow, hangs or fails delays neither the training nor other trackers. A
tracker whose server was down for a while gets what it has missed from the records, and no buffer can run
full. After each delivery the thread notes in `tracker/NAME.json` how far the tracker has got, for a later
start of the run. At its end the thread closes the tracker, also one that has failed: it may have a process
or a file of its own.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from allranks.base import files
from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.components import build
from allranks.trackers.protocol import Position, TrackedRun, Tracker

log = logging.getLogger(__name__)

MOST_FAILURES = 3  # after so many failures in a row a tracker is not called again in this start of the run
MOST_CHARACTERS = 300  # of a tracker's error that are told: some quote a whole answer of their server
MOST_LINES = 1000  # lines of the file of steps that are read, and handed to a tracker, at once
# Between two deliveries of steps. A server should not be called for every step of a quick model.
PAUSE_S = 1.0


class Trackers:
    """All trackers of a run. Every rank knows how many there are; only rank 0 imports and calls them."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        """`section` is the configuration's `tracker`: each key but `every_steps` names a tracker."""
        self._sections = {name: values for name, values in section.items() if name != "every_steps"}
        self.names = list(self._sections)
        # One step in so many is recorded for the trackers; None if they want none.
        self.every_steps: int | None = section.get("every_steps") if self.names else None
        self._trackers: dict[str, Tracker] = {}
        self._followers: list[_Follower] = []

    def build(self) -> None:
        """Makes the trackers; rank 0 alone calls.

        Raises UserError if one does not exist, or the package that it needs is not installed.
        """
        for name, values in self._sections.items():
            key = f"tracker.{name}"
            if not isinstance(values, Mapping) or not isinstance(values.get("_target_"), str):
                raise UserError(
                    f"{key} is not a tracker: give a section with a _target_, the dotted name of its "
                    "class, or take tracker=NAME."
                )
            self._trackers[name] = build(key, values)

    def start(self, run: TrackedRun, steps_file: Path) -> None:
        """The run begins or goes on: starts a thread for each tracker. Rank 0 alone calls."""
        if not self._trackers:
            return
        run.folder.mkdir(exist_ok=True)
        for name, tracker in self._trackers.items():
            follower = _Follower(name, tracker, run, steps_file, self.every_steps)
            follower.start()
            self._followers.append(follower)

    def wake(self, written: int, history: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Tells all trackers that there are new figures; rank 0 alone calls.

        `written`: bytes of whole lines in the file of steps. `history`: the metrics of all epochs, where
        there is a new epoch; else None.
        """
        for follower in self._followers:
            follower.wake(written, history)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is over, and this is its summary.json; close() follows. Rank 0 alone calls."""
        for follower in self._followers:
            follower.finished(summary)

    def close(self, limit_s: float, pictures: Sequence[Path] = ()) -> None:
        """Waits until the trackers have got the whole run and are closed; rank 0 alone calls.

        `limit_s`: the most seconds to wait, for all trackers together. `pictures` are PNG files of a run
        that is finished.
        """
        for follower in self._followers:
            follower.end(pictures)
        deadline = time.monotonic() + limit_s
        for follower in self._followers:
            follower.join(max(0.0, deadline - time.monotonic()))
            if follower.is_alive():
                log.warning(
                    "tracker=%s did not come to its end within %g s: it may not have all of the run",
                    follower.tracker_name, limit_s,
                )  # fmt: skip
                follower.abandon()

    def reopen(self) -> None:
        """Opens the trackers of a finished run once more, after close(), for its pictures; close() follows.

        A tracker that hangs, or that has failed too often, is left alone. Rank 0 alone calls.
        """
        self._followers = [follower.again() for follower in self._followers if follower.may_go_on]
        for follower in self._followers:
            follower.start()


class _State(Enum):
    """How a follower stands to its tracker."""

    CLOSED = "not opened yet, or to be opened again"
    OPEN = "follows"
    FAILED = "has failed, and is opened again at the end of an epoch or of the run"
    LEFT = "has failed MOST_FAILURES times in a row, and is only closed"


class _Follower(threading.Thread):
    """The thread of one tracker. The training's thread only calls wake(), finished() and end()."""

    def __init__(
        self, name: str, tracker: Tracker, run: TrackedRun, steps_file: Path, every_steps: int | None
    ) -> None:
        # A daemon thread: if the tracker hangs, Python ends all the same.
        super().__init__(name=f"tracker {name}", daemon=True)
        self.tracker_name = name
        self._tracker = tracker
        self._run = run
        self._steps_file = steps_file
        self._every_steps = every_steps
        self._note = run.folder / f"{name}.json"
        self._state = _State.CLOSED
        self._failures = 0  # in a row
        self._at = Position()  # how far the tracker has got
        self._offset = 0  # bytes of the file of steps that are read
        self._has_summary = False  # whether the tracker has the summary
        self._is_abandoned = False  # it has been told that the tracker may not have all of the run

        # The training's thread sets the values below, while it holds this condition's lock.
        self._news = threading.Condition()
        self._written = 0
        self._epochs: list[Mapping[str, Any]] = []
        self._has_news = False
        self._has_new_epoch = False
        self._is_over = False
        self._summary: Mapping[str, Any] | None = None
        self._pictures: Sequence[Path] = ()

    @property
    def may_go_on(self) -> bool:
        """Whether the tracker can be opened again: its thread has ended, and has not given it up."""
        return not self.is_alive() and self._state is not _State.LEFT

    def again(self) -> _Follower:
        """A new thread for the same tracker, which goes on where this one has ended.

        It has all that this one was told, so the tracker gets what this one could not deliver.
        """
        follower = _Follower(
            self.tracker_name, self._tracker, self._run, self._steps_file, self._every_steps
        )
        follower._at = self._at
        follower._has_summary = self._has_summary
        follower._written = self._written
        follower._epochs = self._epochs
        follower._summary = self._summary
        return follower

    # --- called by the training's thread --------------------------------------------------------------

    def wake(self, written: int, history: Sequence[Mapping[str, Any]] | None) -> None:
        """There are new figures: `written` bytes in the file of steps, and perhaps a longer `history`."""
        with self._news:
            self._written = written
            if history is not None:
                self._epochs = list(history)
                self._has_new_epoch = True
            self._has_news = True
            self._news.notify()

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is finished, and this is its summary."""
        with self._news:
            self._summary = summary
            self._has_news = True
            self._news.notify()

    def end(self, pictures: Sequence[Path]) -> None:
        """Nothing more comes: the thread delivers what is left, and ends."""
        with self._news:
            self._pictures = pictures
            self._is_over = True
            self._news.notify()

    def abandon(self) -> None:
        """The tracker hangs or cannot be closed: lets it end what would keep this process from ending."""
        self._is_abandoned = True
        abandon = getattr(self._tracker, "abandon", None)
        if abandon is None:
            return
        try:
            abandon()
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything, and must not end the run
            log.warning(
                "tracker=%s: abandon() failed (%s: %s)",
                self.tracker_name, type(error).__name__, _in_short(error),
            )  # fmt: skip

    # --- the thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Delivers whatever comes until the end. A tracker's errors are told, and never raised."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._has_news or self._is_over)
                is_over = self._is_over
                may_try_again = self._has_new_epoch or is_over
                self._has_news = False
                self._has_new_epoch = False
            if self._state is _State.FAILED and may_try_again:
                self._state = _State.CLOSED
            if self._state in (_State.CLOSED, _State.OPEN):
                self._try(self._deliver, is_over)
            if is_over:
                self._close()
                return
            with self._news:
                # The pause between two deliveries. The end of the run or of an epoch cuts it short.
                self._news.wait_for(lambda: self._is_over or self._has_new_epoch, PAUSE_S)

    def _try(self, work: Callable[[], None], is_over: bool) -> None:
        """Calls `work`, which calls the tracker. `is_over`: nothing more comes, so this is the last try."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything, and must not end the run
            self._has_failed(error, is_over)
        else:
            self._failures = 0

    def _has_failed(self, error: Exception, is_over: bool) -> None:
        """Counts a failure of the tracker, and tells of the first, of the last, and of one at the end.

        A server that is down for hours fails once in each epoch: the failures between are not told. Nor is
        what a tracker raises because it was abandoned.
        """
        self._failures += 1
        self._state = _State.LEFT if self._failures >= MOST_FAILURES else _State.FAILED
        if self._is_abandoned:
            return
        if self._state is _State.LEFT:
            what = (
                f"has failed {self._failures} times in a row",
                "it is not called again in this start of the run, and may not have all of the run",
            )
        elif is_over:
            failed = "failed" if self._failures == 1 else "has failed again"
            what = (f"{failed} at the end of the run", "it may not have all of the run")
        elif self._failures == 1:
            what = (
                "failed",
                "the run goes on, and the tracker is tried again after an epoch and at the end",
            )
        else:
            return
        log.warning(
            "tracker=%s %s (%s: %s): %s",
            self.tracker_name, what[0], type(error).__name__, _in_short(error), what[1],
        )  # fmt: skip

    def _deliver(self) -> None:
        """Opens the tracker where it is not open, and hands it all that it has not got."""
        if self._state is _State.CLOSED:
            self._open()
        with self._news:
            written = self._written
            epochs = self._epochs
            summary = self._summary
        for metrics in epochs:
            if metrics["epoch"] > self._at.epoch:
                self._deliver_steps(written, up_to=metrics["step"])
                self._tracker.epoch(files.finite(metrics))
                self._at = Position(max(self._at.step, metrics["step"]), metrics["epoch"])
                self._write_note(self._at)
        self._deliver_steps(written)
        if summary is not None and not self._has_summary:
            self._tracker.summary(files.finite(summary))
            self._has_summary = True

    def _open(self) -> None:
        run = replace(self._run, delivered=self._delivered_so_far())
        at = self._tracker.open(run)
        self._at = run.delivered if at is None else at
        self._offset = 0
        self._state = _State.OPEN
        # A tracker that returns None has removed what it had beyond this position. The note on disk must
        # not say more than the tracker has: what it has removed is delivered once more.
        self._write_note(self._at)

    def _deliver_steps(self, written: int, up_to: int | None = None) -> None:
        """Hands over the recorded steps that the tracker has not got: all, or those up to a step."""
        if self._every_steps is None:
            return
        while self._offset < written:
            records, end = self._next_lines(written, up_to)
            wanted = [
                record
                for record in records
                if record["step"] > self._at.step and record["step"] % self._every_steps == 0
            ]
            if wanted:
                self._tracker.steps(wanted)
                last = wanted[-1]["step"]
                self._at = self._at._replace(step=last)
                # An epoch's metrics stand at the epoch's last step, and are delivered after it. `last` may
                # be that step, and this process may be killed before it delivers the metrics. So the note
                # on disk says one step less. A later start then removes the step and the metrics together,
                # and delivers both.
                self._write_note(self._at._replace(step=last - 1))
            is_stuck = end == self._offset  # the next line is a step beyond `up_to`
            self._offset = end
            if is_stuck:
                return

    def _next_lines(self, written: int, up_to: int | None) -> tuple[list[dict[str, Any]], int]:
        """The next records of the file of steps, and where in the file they end, in bytes."""
        records: list[dict[str, Any]] = []
        end = self._offset
        with self._steps_file.open("rb") as file:
            file.seek(self._offset)
            while end < written and len(records) < MOST_LINES:
                line = file.readline()
                if not line:
                    break
                record = json.loads(line)
                if up_to is not None and record["step"] > up_to:
                    break
                end += len(line)
                records.append(record)
        return records, end

    def _close(self) -> None:
        """Hands over the pictures, and closes the tracker.

        A tracker that has failed is closed as well, for it may have a process or a file of its own. Its
        failure has been told, so what it raises then is not. One that cannot be closed is abandoned.
        """
        if self._pictures and self._state is _State.OPEN:
            self._try(lambda: self._tracker.pictures(self._pictures), is_over=True)
        try:
            self._tracker.close(finished=self._has_summary)
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything, and must not end the run
            if self._state is _State.OPEN:
                self._has_failed(error, is_over=True)
            if not self._is_abandoned:  # else close() hung, and has been ended by the training's thread
                self.abandon()

    # --- how far the tracker is, for a later start ----------------------------------------------------

    def _write_note(self, position: Position) -> None:
        files.write_json(self._note, position._asdict())

    def _delivered_so_far(self) -> Position:
        """How far the tracker has certainly got.

        This start of the run knows it once it has delivered something. Until then the note of an earlier
        start says it. That start may have come further than the checkpoint from which this one goes on.
        What lies beyond the checkpoint is delivered once more.
        """
        if self._at != Position():
            return self._at
        noted = _noted(self._note)
        resumed = self._run.resumed
        return Position(min(noted.step, resumed.step), min(noted.epoch, resumed.epoch))


def _in_short(error: Exception) -> str:
    """What the error says, on one line; at most MOST_CHARACTERS of it, and then `...`."""
    said = one_line(error)
    return said if len(said) <= MOST_CHARACTERS else f"{said[:MOST_CHARACTERS]}..."


def _noted(path: Path) -> Position:
    """The position that this file notes; the beginning of the run where it is missing or damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return Position()
    match values:
        case {"step": int(step), "epoch": int(epoch)}:
            return Position(step, epoch)
        case _:
            return Position()
