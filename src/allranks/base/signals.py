"""The signals that ask a process to stop: counted, so that it can come to a good place before it ends."""

from __future__ import annotations

import atexit
import signal
import time
from collections.abc import Callable
from types import FrameType

from allranks.base.processes import STOPPING

FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)
# A terminal sends Ctrl-C to all processes in it, and a launcher that got it passes it on: the second of two
# that come within this time is the same Ctrl-C. One that comes later is a person who does not want to wait.
TWICE_S = 1.0


class Signals:
    """The signals that ask a run to stop, counted for the process's whole life.

    With of_process=False no signal is ever counted: the run is then only a part of what this process does,
    and the program around it decides what a signal does.
    """

    def __init__(self, of_process: bool = True) -> None:
        self._of_process = of_process
        self.counts = dict.fromkeys(STOPPING, 0)
        self.first: signal.Signals | None = None  # the first one that has come
        self.answer: Callable[[str], None] | None = None  # called with the first one's name, as it comes
        self._interrupted_at: float | None = None  # when the first Ctrl-C came

    def count(self, *numbers: signal.Signals) -> None:
        """From now on these signals are counted, and no longer end the process."""
        if not self._of_process:
            return
        for number in numbers:
            if number in FROM_TERMINAL and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup, or in the background by a script: it stays ignored
            signal.signal(number, self._count)
            # Python ends its handlers before it ends itself. A signal in that moment would kill the
            # process, and change the exit code of a run that has ended.
            atexit.register(signal.signal, number, signal.SIG_IGN)

    def let_end(self, *numbers: signal.Signals) -> None:
        """From now on these signals end the process again."""
        for number in numbers:
            if signal.getsignal(number) == self._count:
                is_ctrl_c = number == signal.SIGINT
                signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)

    @property
    def names(self) -> list[str]:
        """The names of the signals that have come."""
        return [number.name for number, count in self.counts.items() if count]

    def _count(self, number: int, _: FrameType | None) -> None:
        self.counts[signal.Signals(number)] += 1
        if self.first is None:
            self.first = signal.Signals(number)
            if self.answer is not None:
                self.answer(self.first.name)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now > self._interrupted_at + TWICE_S:
            raise KeyboardInterrupt
