"""How far a rank's training has come: a few numbers, written by the main thread, read by the watchdog.

The training tells it each step, each evaluated batch, and each collective that it comes to. Each call costs
less than a microsecond. There is no lock: the main thread alone writes, and the watchdog's thread only asks
whether anything has changed.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

from allranks.config import WatchdogConfig

# Without `watchdog.step_s` a step may take ten times as long as the usual one, but at least 30 s: steps of
# a millisecond are often interrupted for longer than 10 ms by a file system or by another program.
LEAST_STEP_S = 30.0
USUAL_STEPS = 10
REMEMBERED_STEPS = 101  # the median is taken over the durations of so many steps


class Allowance(NamedTuple):
    """What a rank is doing, and how long that may take without progress."""

    activity: str  # in words, with the key that sets the limit
    limit_s: float


class Progress:
    """What one rank has done so far in this run."""

    def __init__(self, limits: WatchdogConfig) -> None:
        self.limits = limits
        self.main_thread = threading.get_ident()
        self.step = 0  # the number of steps completed, those before a resume included
        # 0 before this process has begun with steps; from then on 1, and 1 more for each step that it has
        # completed: the number of the step that is going on.
        self.begun = 0
        self.batches = 0  # the number of batches evaluated
        # How many pieces of other work were done that takes long, such as reading a checkpoint.
        self.pieces = 0
        self.arrivals = 0  # how often this rank has come to a collective
        self.compiles = False  # whether any step may take as long as the first one
        # How long this rank's own work on its steps took, up to each step's first collective. Set back to 0
        # by those who compare the ranks.
        self.busy_s = 0.0
        self.busy_steps = 0

        # Whom this rank waits for, before the ranks are in touch; "" if it does not wait.
        self.waits_for = ""
        self._phase: Allowance | None = None  # a stretch with a limit of its own
        self._began_s = time.perf_counter()  # the step that is going on
        self._busy = False  # the step that is going on has not come to a collective yet
        self._durations_s: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    # --- what the training says -----------------------------------------------------------------------

    def begin_steps(self, step: int) -> None:
        """The steps of an epoch begin, after `step` steps in all; perhaps none is left of this epoch.

        A run that goes on at an evaluation has no step left there. This process's first step, which may
        compile, then comes in the next epoch.
        """
        self.step = step
        self.begun = max(self.begun, 1)
        self.pieces += 1  # what has come before is done, such as writing the records of an epoch
        self._began_s = time.perf_counter()
        self._busy = self.begun > 1

    def completed(self, step: int) -> None:
        """`step` steps are completed, and the next one begins."""
        now = time.perf_counter()
        if self.begun > 1:  # the first step compiles, and is no measure for others
            self._durations_s.append(now - self._began_s)
        self.step = step
        self._began_s = now
        self.begun += 1
        self._busy = self.begun > 1

    def evaluated_batch(self) -> None:
        """A batch has been evaluated."""
        self.batches += 1
        self._busy = False  # what comes next is not a step

    def worked(self) -> None:
        """A piece of other long work is done, such as reading a checkpoint: this rank is well."""
        self.pieces += 1

    def arrive(self, in_step: bool = True) -> None:
        """To be called when this rank comes to a collective.

        The time from the beginning of a step to its first collective counts as the rank's own work.
        `in_step` is False for a collective that does not belong to a step.
        """
        self.arrivals += 1
        if self._busy and in_step:
            self._busy = False
            self.busy_s += time.perf_counter() - self._began_s
            self.busy_steps += 1

    @contextlib.contextmanager
    def phase(self, activity: str, limit_s: float) -> Iterator[None]:
        """A stretch with a limit of its own, such as a save. The other ranks wait for this one as long."""
        before = self._phase
        self._phase = Allowance(activity, limit_s)
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def waiting_for(self, whom: str) -> Iterator[None]:
        """In the block this rank waits for another one, `whom`, which is named if it does not come."""
        self.waits_for = whom
        try:
            yield
        finally:
            self.waits_for = ""

    def writing(self) -> AbstractContextManager[None]:
        """A block in which records are written: a shared file system may hang for a minute."""
        return self.phase("writing records (watchdog.save_s)", self.limits.save_s)

    # --- what the watchdog asks -----------------------------------------------------------------------

    def mark(self) -> object:
        """A value that changes whenever there is progress."""
        return self.begun, self.batches, self.pieces, self.arrivals, self._phase

    def allowance(self) -> Allowance:
        """What this rank is doing, and how long that may take without progress."""
        if self._phase is not None:
            return self._phase

        if self.begun == 0:
            return Allowance("the start (watchdog.start_s)", self.limits.start_s)

        if self.begun == 1 or self.compiles:
            activity = "a step that is the first or compiles (watchdog.first_step_s)"
            return Allowance(activity, self.limits.first_step_s)

        step_s = self.limits.step_s
        if step_s is None:
            durations_s = list(self._durations_s)  # a copy: the main thread may append meanwhile
            usual_s = statistics.median(durations_s) if durations_s else 0.0
            step_s = max(LEAST_STEP_S, USUAL_STEPS * usual_s)
        return Allowance("a step (watchdog.step_s)", step_s)
