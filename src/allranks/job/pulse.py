"""`allranks.heartbeat()` and `allranks.should_stop()`: for a program that keeps its own everything.

Such a program is started by `allranks launch -- PROGRAM`, and calls these two functions. They need neither
torch nor MPI: each rank shares a page of memory with its guard (launch/guard.py), and the guard talks to
`allranks launch`. job/variables.py has the places in that page.

    heartbeat()     the rank tells that it makes progress. If it then makes none for too long, the launch
                    names it, shows where it is, and ends
    should_stop()   whether the program is to save and to end now, because of a signal or because its job's
                    time is nearly over: the same answer on all ranks

How the ranks agree: a rank that has a reason to stop says so in its page. `allranks launch` has all guards
hold their ranks at their next call of should_stop(), learns how many calls each rank has completed, and
says from which call on the answer is True. No rank has come as far as that yet, so all ranks stop after the
same call.

Without `allranks launch` heartbeat() does nothing, and should_stop() is what this one process knows.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import threading
import time
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial

from allranks.base.errors import UserError, show
from allranks.base.processes import DUMP_FOR_LAUNCH_SIGNAL, STOPPING
from allranks.base.signals import Signals
from allranks.job import scheduler
from allranks.job.identity import discover
from allranks.job.variables import (
    BEATS,
    CALLS,
    HOLD,
    NO_LIMIT_MS,
    PAGE_BYTES,
    PAGE_NAME,
    PULSE,
    STACK_AT,
    STACK_PID,
    STEPS,
    STOP_AT,
    WAITS,
    WISH,
    WISH_JOB_END,
    WITHIN_MS,
)

NO_LIMIT_S = 1e9  # thirty years: math.inf, and whatever else does not fit the page
RESERVE_S = 60.0  # kept free before the job's end, unless the program says how long its save takes
# How long the launch may take to say when to stop; if it takes longer, the next call asks again.
AGREE_S = 30.0
LOOK_S = 0.001  # how often a rank that is held looks into its page


@dataclass(frozen=True)
class Page:
    """Numbers that this process writes, and its guard reads."""

    numbers: memoryview[int]
    guard_pid: int | None = None  # None: there is no guard, and nobody reads the numbers
    descriptor: int | None = None  # of the memory


@cache
def _page() -> Page:
    """The page that this rank shares with its guard. The first call opens it."""
    path = os.environ.get(PULSE, "")  # /proc/PID/fd/N
    try:
        # In a container the number may be another process's, and the descriptor lead to any file.
        is_ours = os.readlink(path).startswith(f"/memfd:{PAGE_NAME}")  # noqa: PTH115
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if is_ours else None
    except OSError:  # there is no guard
        descriptor = None
    if descriptor is None:
        return Page(memoryview(array("q", bytes(PAGE_BYTES))))

    numbers = memoryview(mmap.mmap(descriptor, PAGE_BYTES)).cast("q")
    return Page(numbers, int(path.split("/")[2]), descriptor)


@cache
def _watched_page() -> memoryview[int]:
    """The numbers of the page, of a process that writes down its stack when the guard asks for it."""
    page = _page()
    if page.descriptor is not None:
        os.lseek(page.descriptor, STACK_AT, os.SEEK_SET)
        # faulthandler's handler is written in C: it works where the main thread keeps Python's lock. The
        # descriptor stays open for it.
        faulthandler.register(DUMP_FOR_LAUNCH_SIGNAL, file=page.descriptor, all_threads=False)
        page.numbers[STACK_PID] = os.getpid()
    return page.numbers


# --- the watchdog -----------------------------------------------------------------------------------------


def heartbeat(within_s: float | None = None) -> None:
    """Tells the watchdog of `allranks launch` that this rank makes progress. Takes less than 1 us.

    Call it in each step of the loop. From the first call on the next one has to come within the limit:
    `within_s` seconds if given, else those of `allranks launch --idle`, else 600. math.inf stands for no
    limit: give it at the end of the loop, or before work that takes as long as it likes. A rank that misses
    its limit is named with its stack, and the launch ends. Does nothing without `allranks launch`. Raises
    UserError if `within_s` is not above 0.
    """
    numbers = _watched_page()
    numbers[WITHIN_MS] = 0 if within_s is None else _milliseconds(within_s)
    numbers[BEATS] += 1


def _milliseconds(within_s: float) -> int:
    """The time as a number in the page, at least 1."""
    if not within_s > 0:
        raise UserError(f"heartbeat(within_s={within_s}) is not valid: give a number of seconds above 0.")
    return NO_LIMIT_MS if within_s >= NO_LIMIT_S else max(1, int(within_s * 1000))


def count_step() -> None:
    """Counts a step of a loop that has its own watchdog: the launch then knows how far it has come."""
    _page().numbers[STEPS] += 1


# --- the end of the job -----------------------------------------------------------------------------------


def should_stop(reserve_s: float = RESERVE_S) -> bool:
    """Whether the program is to save now, and to end with exit code 85 (`allranks.EXIT_REQUEUE`).

    True once a signal has come that asks for it (SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2), or once the
    job ends in less than `reserve_s` seconds and the longest time between two calls so far. `reserve_s` is
    what a save and the end of the program take. Once True, it stays True.

    Call it once in each step, on all ranks equally often: under `allranks launch` all ranks then get True
    at the same call. The first call catches the signals, so make it early, and from the main thread. Under
    another launcher each rank answers by what it knows itself.
    """
    return _stop().ask(reserve_s)


@cache
def _stop() -> Stop:
    """What this rank knows of reasons to stop. The first call begins to find out."""
    return Stop(_page(), os.environ)


class Stop:
    """What this rank knows of reasons to stop."""

    def __init__(self, page: Page, environ: Mapping[str, str]) -> None:
        self.page = page
        self.signals = Signals()
        self.job_ends_at: float | None = None  # a time by time.monotonic(); None: not known
        self._asked_at: float | None = None
        self._longest_s = 0.0  # between two calls
        if threading.current_thread() is threading.main_thread():
            self.signals.count(*STOPPING)
            # A child made by fork, such as a worker that reads data, ends by SIGTERM as its parent expects.
            os.register_at_fork(after_in_child=lambda: self.signals.let_end(*STOPPING))
        # Who finds out when the job ends? Under `allranks launch` rank 0 alone does, because all ranks stop
        # when one of them wants to. Under another launcher each rank reads ALLRANKS_DEADLINE, and only a
        # process that is alone asks the scheduler, too: otherwise thousands of ranks would ask it at the
        # same time.
        try:
            identity = discover(environ)
            is_first, is_alone = identity.rank == 0, identity.alone
        except UserError:  # it is not known whether this process is the only one
            is_first, is_alone = False, False
        if is_first or page.guard_pid is None:
            asks_scheduler = is_first and (is_alone or page.guard_pid is not None)
            threading.Thread(
                target=self._find_end, args=(dict(environ), asks_scheduler), daemon=True
            ).start()

    def ask(self, reserve_s: float) -> bool:
        """Whether to stop at this call."""
        numbers = self.page.numbers
        # The order matters: first the call is counted, then the hold is looked for. A guard that has set
        # the hold then sees each call that did not wait for it.
        numbers[CALLS] += 1
        if numbers[HOLD] and not numbers[STOP_AT]:
            self._wait()
        if numbers[STOP_AT]:
            return numbers[CALLS] >= numbers[STOP_AT]

        wish = self._wish(reserve_s)
        if not wish or self.page.guard_pid is None:
            return bool(wish)
        numbers[WISH] = wish
        with suppress(OSError):  # the guard has ended, and so will this process
            os.kill(self.page.guard_pid, signal.SIGCHLD)  # it looks into the page at each SIGCHLD
        self._wait()
        return 0 < numbers[STOP_AT] <= numbers[CALLS]

    def _wish(self, reserve_s: float) -> int:
        """The signal that has come, WISH_JOB_END where the job ends soon, else 0."""
        now = time.monotonic()
        if self._asked_at is not None:
            self._longest_s = max(self._longest_s, now - self._asked_at)
        self._asked_at = now
        if self.signals.first is not None:
            return self.signals.first
        is_late = self.job_ends_at is not None and now + reserve_s + self._longest_s > self.job_ends_at
        return WISH_JOB_END if is_late else 0

    def _wait(self) -> None:
        """Waits until the launch has said from which call on to stop."""
        numbers = self.page.numbers
        numbers[WAITS] = 1
        give_up_at = time.monotonic() + AGREE_S
        while not numbers[STOP_AT] and time.monotonic() < give_up_at:
            time.sleep(LOOK_S)
        numbers[WAITS] = 0

    def _find_end(self, environ: Mapping[str, str], asks_scheduler: bool) -> None:
        """Finds out when the job ends. A scheduler may take its time to answer, so this is a thread."""

        def warn(error: UserError) -> None:
            show(f"when this job ends is not known: {error}")

        try:
            ends_at = scheduler.asked_until_answered(partial(_end_of_job, environ, asks_scheduler), warn)
        except UserError as error:
            warn(error)
            return
        if ends_at is not None:
            self.job_ends_at = time.monotonic() + ends_at - time.time()


def _end_of_job(environ: Mapping[str, str], asks_scheduler: bool) -> int | None:
    """The job's end, in seconds since 1970: ALLRANKS_DEADLINE, or what the scheduler says; else None."""
    text = environ.get("ALLRANKS_DEADLINE", "")
    if text.isascii() and text.isdecimal():
        return int(text)
    if text:
        raise UserError(f"ALLRANKS_DEADLINE={text} is not a time in seconds since 1970.")
    return scheduler.ends_at(environ) if asks_scheduler else None
