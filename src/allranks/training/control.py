"""When to save and when to stop: agreed by all ranks, between two batches. No torch.

A signal may reach only one of the ranks, or each at another moment, and the clocks of hosts differ. If each
rank decided for itself, some would stop while the others wait for them in a collective. So the ranks meet
now and then in one small sum, about every quarter of a second, and do together what it says.

    JobEnd     knows when the job ends
    Pace       says after how many steps or batches the ranks meet next
    Control    lets the ranks meet, and saves or stops as they have agreed
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from allranks.base.errors import EXIT_REQUEUE, UserError
from allranks.base.processes import STOPPING
from allranks.base.signals import Signals
from allranks.config import CheckpointConfig
from allranks.job import scheduler

if TYPE_CHECKING:
    from allranks.runtime.runtime import Runtime
    from allranks.training.position import TrainingPosition
    from allranks.training.saver import Saver

log = logging.getLogger(__name__)

STDOUT = 1  # the file descriptor
# The ranks meet about once in this time. So a signal is answered within it. A meeting takes some 0.1 ms.
BEAT_S = 0.25
# Steps may become a hundred times slower before the next meeting. Even then it should come within minutes.
MOST_STEPS_BETWEEN_MEETINGS = 10_000
# Kept free before the job's end, besides what the run's own saves and steps have taken at most so far: for
# the ranks to close, and for the job script to queue a successor.
MARGIN_S = 10.0
# If the job's end is known, a process saves for the first time after so many seconds, or after half of its
# time in the job if that is shorter. Only a save shows how long a save takes. Without this one, a training
# whose epochs are longer than its jobs would begin its only save MARGIN_S before the end. On a slow file
# system each of its jobs would end in the middle of that save.
FIRST_SAVE_S = 300.0
# The message if the ranks of a user's own loop evaluate on different batches.
OTHER_BATCHES = (
    "run.mean() or run.means() has gone through other batches of run.batches() on other ranks. Their "
    "source must give the same batches on all ranks, of which each rank keeps its share: leave out what "
    "depends on the rank, and let random numbers come from the generators of torch, NumPy or random, which "
    "allranks seeds."
)


class RunStopped(SystemExit):
    """All ranks have agreed to stop. What was trained is saved, and another start goes on from there.

    It is a SystemExit, so that no `except Exception` of a user's loop takes it for an error. If nothing
    catches it, the process ends with exit code 85, which asks for another start.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_REQUEUE)


# --- what may ask for a stop ----------------------------------------------------------------------------


def say_at_once(signal_name: str) -> None:
    """Tells the user that a signal has come, from within its handler.

    It is written without Python's own buffers: the handler may have interrupted a write to them.
    """
    text = f"{signal_name}: stopping after this batch; what is done so far is saved\n"
    with suppress(OSError):  # nobody reads it any more
        os.write(STDOUT, text.encode())


class JobEnd:
    """When the job ends. A scheduler may take its time to answer: it is asked on a thread."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.at: float | None = (
            None  # by time.monotonic(), which no change of a clock moves; None: not known
        )
        threading.Thread(target=self._find, args=(dict(environ),), daemon=True).start()

    def _find(self, environ: Mapping[str, str]) -> None:
        def warn(error: UserError) -> None:
            log.warning("when this job ends is not known: %s", error)

        try:
            ends_at = scheduler.asked_until_answered(partial(end_of_job, environ), warn)
        except UserError as error:
            warn(error)
            return
        if ends_at is not None:
            self.at = time.monotonic() + ends_at - time.time()


def end_of_job(environ: Mapping[str, str]) -> int | None:
    """The job's end, in seconds since 1970; None outside a job, or if its scheduler sets no end.

    If ALLRANKS_DEADLINE is set, the scheduler is not asked. Raises UserError if the scheduler does not
    answer.
    """
    text = environ.get("ALLRANKS_DEADLINE", "")
    if text.isascii() and text.isdecimal():
        return int(text)
    if text:
        log.warning("ALLRANKS_DEADLINE=%s is not a time in seconds since 1970: it is not used", text)
    return scheduler.ends_at(environ)


# --- the meeting ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wishes:
    """What one rank brings to a meeting; added up, what the ranks have agreed on."""

    signals: Sequence[float]  # for each signal in STOPPING, the number of ranks that have got it
    late: float  # rank 0's: the job ends soon
    overdue: float  # rank 0's: checkpoint.every_s has passed, or the first save is due
    pause: float  # rank 0's: after how many steps or batches to meet again
    ended: float = 0  # the number of ranks whose evaluation has no batch left

    def to_numbers(self) -> list[float]:
        """The wishes as a row of numbers, which the ranks can add up."""
        return [*self.signals, self.late, self.overdue, self.pause, self.ended]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Wishes:
        """The wishes that to_numbers() has turned into a row of numbers, or a sum of such rows."""
        *signals, late, overdue, pause, ended = numbers
        return cls(signals, late, overdue, pause, ended)

    @property
    def signal_names(self) -> list[str]:
        """The names of the signals that some rank has got."""
        return [number.name for number, ranks in zip(STOPPING, self.signals, strict=True) if ranks]

    @property
    def reason(self) -> str:
        """Why to stop; empty if nothing asks for it."""
        if self.signal_names:
            return " and ".join(self.signal_names)
        return "the job's end" if self.late else ""


class Pace:
    """After how many steps, or batches of one evaluation, the ranks meet: about every BEAT_S."""

    def __init__(self) -> None:
        self.next = 0  # the number of the step after which the ranks meet
        self._met_after: int | None = None
        self._met_at = 0.0

    def is_due(self, number: int) -> bool:
        """Whether the ranks meet after step or batch `number`."""
        return number >= self.next

    def pause(self, number: int, now: float) -> int:
        """The number of steps that take about BEAT_S, by the pace since the last meeting."""
        if self._met_after is None or number == self._met_after:
            return 1
        step_s = (now - self._met_at) / (number - self._met_after)
        return max(1, min(MOST_STEPS_BETWEEN_MEETINGS, int(BEAT_S / max(step_s, 1e-6))))

    def met(self, number: int, now: float, pause: int) -> None:
        """The ranks have met after step `number`, and have agreed on a pause of so many steps."""
        self.next = number + pause
        self._met_after = number
        self._met_at = now


class Control:
    """The ranks' agreement on saving and stopping in one run; every rank has one.

    `when` says when to save. `epochs` says when the training has come to its end; it is None where only the
    training itself knows. `clock` gives seconds, from any moment on.
    """

    def __init__(
        self,
        runtime: Runtime,
        saver: Saver,
        signals: Signals,
        when: CheckpointConfig,
        epochs: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runtime = runtime
        self.when = when
        self.epochs = epochs
        self.saver = saver
        self.signals = signals
        self.reason = ""  # why the run stopped
        self.job_end = JobEnd(os.environ) if runtime.is_main else None
        self._clock = clock
        self._steps = Pace()
        self._batches = Pace()  # of the evaluation under way
        self._began_at = clock()
        self._saved_at = self._began_at
        self._has_saved = False  # whether this process has saved the training
        self._met_at: float | None = None
        self._longest_s = 0.0  # between two meetings
        self._has_gained = False  # whether this process has taken a step
        if runtime.is_main:
            signals.answer = say_at_once
            if signals.names:  # a signal came before there was anything to answer it
                say_at_once(signals.names[0])

    @property
    def position(self) -> TrainingPosition:
        """Where the training stands."""
        return self.saver.kept.position

    @property
    def left_s(self) -> float:
        """Seconds until the job's end, as far as this rank knows; infinity if no end is known."""
        if self.job_end is None or self.job_end.at is None:
            return math.inf
        return self.job_end.at - self._clock()

    # --- between two steps ---

    def is_due(self, step: int) -> bool:
        """Whether the ranks meet after this step; the same on all ranks."""
        every = self.when.every_steps
        return self._steps.is_due(step) or bool(every and step % every == 0)

    def meet(self, evaluates_next: bool = False) -> None:
        """The ranks agree whether to save and whether to stop. All ranks call this, between two steps.

        If they agree to stop, they save, and RunStopped is raised on all of them. If only a save is due,
        they save. With `evaluates_next` the evaluation of the epoch comes next. Then a save that is due is
        left to the call after the evaluation, so that the checkpoint has the epoch's metrics. A stop does
        not wait for the evaluation.
        """
        position = self.position
        now = self._clock()
        is_overdue = self._is_overdue(now) or self._is_first_save_due(now)
        agreed = self._meet(self._steps, position.step, now, is_overdue)
        if position.epoch_steps:
            self._has_gained = True
        is_done = position.epoch_steps == 0 and position.epoch == self.epochs
        stops = bool(agreed.reason) and not is_done
        is_time = is_done or bool(agreed.overdue) or self._is_time_to_save()
        if stops or (is_time and not evaluates_next):
            self._save()
        if stops:
            self.reason = agreed.reason
            raise RunStopped

    def _is_time_to_save(self) -> bool:
        """Whether checkpoint.every_steps or checkpoint.every_epochs falls on this step."""
        position = self.position
        every_steps = self.when.every_steps
        if every_steps and position.step % every_steps == 0:
            return True
        every_epochs = self.when.every_epochs
        is_end_of_epoch = position.epoch_steps == 0
        return bool(is_end_of_epoch and every_epochs and position.epoch % every_epochs == 0)

    # --- between two batches of an evaluation ---

    def begin_evaluation(self) -> None:
        """To be called when an evaluation begins. Its batches are counted from 1."""
        self._batches = Pace()

    def check_evaluation(
        self, batch: int, gains: bool = False, can_stop: Callable[[], bool] = lambda: True
    ) -> None:
        """After a batch of an evaluation, saves and raises RunStopped if the ranks have agreed to stop.

        What is saved is the training as it was before the evaluation, which does not change it. After a
        resume the evaluation is done again from its beginning.

        A signal stops the run. The end of the job stops it only if this process has gained
        something: it has taken a step, or `gains` says that the caller itself keeps the work done so far,
        as run.share() does. Otherwise the evaluation goes on until the job is over, because the end of this
        evaluation is all that the job can gain.

        If only the first save is due (FIRST_SAVE_S), the run saves, and the evaluation goes on. Before
        anything is saved, `can_stop` is asked, on all ranks, whether the run may save and stop here.

        All ranks call this after the same batches. Raises UserError, on all ranks, if another rank has no
        batch left and is in end_evaluation().
        """
        if not self._batches.is_due(batch):
            return
        now = self._clock()
        agreed = self._meet(self._batches, batch, now, self._is_first_save_due(now))
        self._refuse_unequal(agreed)
        stops = agreed.signal_names or (agreed.late and (self._has_gained or gains))
        if not (stops or agreed.overdue) or not can_stop():
            return
        self._save()
        if stops:
            self.reason = agreed.reason
            raise RunStopped

    def end_evaluation(self, batches: int) -> None:
        """To be called by all ranks when they have no batch left in an evaluation, after `batches` of them.

        This is needed only if the number of batches may differ between the ranks. Raises UserError, on all
        ranks, if other ranks have batches left: they meet this rank in check_evaluation().
        """
        if self.runtime.world_size > 1:
            now = self._clock()
            self._refuse_unequal(self._meet(self._batches, batches, now, is_overdue=False, ended=True))

    def _refuse_unequal(self, agreed: Wishes) -> None:
        """Raises UserError if some ranks have no batch left in an evaluation, and others have."""
        if 0 < agreed.ended < self.runtime.world_size:
            raise UserError(OTHER_BATCHES, said_by=0)

    # --- for both ---

    def _meet(self, pace: Pace, number: int, now: float, is_overdue: bool, ended: bool = False) -> Wishes:
        """The ranks add up what each of them wishes after step or batch `number`, and return the sums.

        `is_overdue`: whether rank 0 wishes a save. `ended`: whether this rank has no batch left in an
        evaluation.
        """
        if self._met_at is not None:
            self._longest_s = max(self._longest_s, now - self._met_at)
        is_main = self.runtime.is_main
        mine = Wishes(
            signals=[float(self.signals.counts[number] > 0) for number in STOPPING],
            late=is_main and self._is_late(now),
            overdue=is_main and is_overdue,
            pause=pace.pause(number, now) if is_main else 0,
            ended=ended,
        )
        agreed = Wishes.from_numbers(self.runtime.add_up(mine.to_numbers()))
        pace.met(number, now, round(agreed.pause))
        self._met_at = now
        return agreed

    def _is_late(self, now: float) -> bool:
        """Whether the job ends too soon to go on: a save, and the time up to the next meeting, must fit."""
        if self.job_end is None or self.job_end.at is None:
            return False
        reserve_s = MARGIN_S + 2 * self.saver.longest_s + self._longest_s
        return now + reserve_s > self.job_end.at

    def _is_overdue(self, now: float) -> bool:
        every_s = self.when.every_s
        return every_s is not None and now - self._saved_at >= every_s

    def _is_first_save_due(self, now: float) -> bool:
        """Whether to save only in order to know, before the job's end, how long a save takes."""
        if self._has_saved or self.job_end is None or self.job_end.at is None:
            return False
        half_s = (self.job_end.at - self._began_at) / 2
        # As long as nothing has changed since the checkpoint that the run went on from, a save writes
        # nothing.
        return now - self._began_at >= min(FIRST_SAVE_S, half_s) and not self.saver.is_saved()

    def _save(self) -> None:
        self._has_saved |= not self.saver.is_saved()
        self.saver.save()
        self._saved_at = self._clock()
