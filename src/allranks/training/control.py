"""When to save and when to stop: agreed by all ranks, at the boundary of a step. No torch.

Signals and clocks differ from rank to rank. So the ranks meet now and then in one small sum, about every
quarter of a second and at the ends of an epoch, and do together what it says.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING

from allranks.base.errors import UserError
from allranks.base.processes import STOPPING
from allranks.config import Config
from allranks.job import scheduler

if TYPE_CHECKING:
    from allranks.runtime.runtime import Runtime
    from allranks.training.saver import Saver
    from allranks.training.training import Training

log = logging.getLogger(__name__)

BEAT_S = 0.25
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)
TWICE_S = 1.0  # a Ctrl-C later than that is a second one: the first may come from terminal and launcher
MARGIN_S = 10.0  # before the deadline, besides what the run's own saves and steps take


class Signals:
    """Those that stop a run, for the process's whole life: counted. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(STOPPING, 0)
        self._interrupted_at = 0.0

    def count(self, *numbers: signal.Signals) -> None:
        """From now on. A later one must not change a run's exit code while Python ends either."""
        for number in numbers:
            if number in FROM_TERMINAL and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup, or a script's background
            signal.signal(number, self._count)
            atexit.register(signal.signal, number, signal.SIG_IGN)  # handlers in Python end before it does

    def _count(self, number: int, _: FrameType | None) -> None:
        self.counts[signal.Signals(number)] += 1
        if number == signal.SIGINT:
            self._interrupted_at = self._interrupted_at or time.monotonic()
            if time.monotonic() > self._interrupted_at + TWICE_S:
                raise KeyboardInterrupt


class Control:
    """The ranks' agreement; every rank has one."""

    def __init__(self, runtime: Runtime, config: Config, saver: Saver, signals: Signals) -> None:
        self.runtime, self.config, self.saver, self.signals = runtime, config, saver, signals
        self.ends_at: float | None = None  # the job, by time.monotonic(), which no clock's change moves
        self.reason = ""  # why the run stopped
        self._next = 0  # the step after which the ranks meet again
        self._saved_at = self._met_at = time.monotonic()
        self._met_after: int | None = None
        self._longest_s = 0.0  # between two meetings
        if runtime.is_main:  # a scheduler may take its time to answer
            threading.Thread(target=self._find_end, args=(dict(os.environ),), daemon=True).start()

    def is_due(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return step >= self._next or bool(every and step % every == 0)

    def agree_to_stop(self, training: Training, evaluates_next: bool = False) -> bool:
        """Saves where it is time to; True where the run is to stop now, after a save. All ranks call.

        A run that `evaluates_next` saves after that, unless it stops: then the checkpoint has the metrics.
        """
        now = time.monotonic()
        if self._met_after is not None:
            self._longest_s = max(self._longest_s, now - self._met_at)
        config, main, step = self.config.checkpoint, self.runtime.is_main, training.step
        is_late = main and self.ends_at is not None and now + self._reserve_s() > self.ends_at
        is_overdue = main and config.every_s is not None and now - self._saved_at >= config.every_s
        mine = [float(self.signals.counts[s] > 0) for s in STOPPING]
        pause = self._pause(step, now) if main else 0
        *asked, late, overdue, pause = self.runtime.add_up([*mine, is_late, is_overdue, pause])
        self._next, self._met_at, self._met_after = step + round(pause), now, step

        at_end = training.epoch_steps == 0  # of an epoch
        done = at_end and training.epoch == self.config.trainer.epochs
        stop = any([*asked, late]) and not done
        every_steps, every_epochs = config.every_steps, config.every_epochs
        on_time = (
            done
            or overdue
            or (every_steps and step % every_steps == 0)
            or (at_end and every_epochs and training.epoch % every_epochs == 0)
        )
        if stop or (on_time and not evaluates_next):
            self.saver.save(training)
            self._saved_at = time.monotonic()
        if stop:
            names = [s.name for s, count in zip(STOPPING, asked, strict=True) if count]
            self.reason = " and ".join(names) or "the job's end"
        return stop

    def _reserve_s(self) -> float:
        return MARGIN_S + 2 * self.saver.longest_s + self._longest_s

    def _find_end(self, environ: Mapping[str, str]) -> None:
        text = environ.get("ALLRANKS_DEADLINE", "")
        is_time = text.isascii() and text.isdecimal()
        try:
            ends_at = int(text) if is_time else scheduler.ends_at(environ)
        except UserError as error:
            log.warning("when this job ends is not known: %s", error)
            return
        if text and not is_time:
            log.warning("ALLRANKS_DEADLINE=%s is not a time in seconds since 1970: it is not used", text)
        if ends_at is not None:
            self.ends_at = time.monotonic() + ends_at - time.time()

    def _pause(self, step: int, now: float) -> float:
        """The number of steps that take about BEAT_S, by the pace since the last meeting."""
        if self._met_after is None or step == self._met_after:
            return 1
        step_s = (now - self._met_at) / (step - self._met_after)
        return max(1, min(10_000, int(BEAT_S / max(step_s, 1e-6))))
