"""Has the scheduler suspended the whole job, as it does for one that is more urgent?

A scheduler suspends a job by stopping all of its processes at once, while `allranks launch` may run on
outside of it, as in a shell of salloc on a login node. All guards are silent then, and must not be taken
for lost. On this host we see whether the guards and their programs are stopped. Of other hosts the
scheduler knows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from allranks.base import processes

# The scheduler is asked at most once in this time whether it has suspended the job: all users share it.
ASK_SCHEDULER_S = 60.0
# How long its answer may take. Its command has a limit of 60 s, but may hang in the kernel beyond it.
SCHEDULER_ANSWER_S = 90.0


class Suspension:
    """Whether a job whose guards are all silent is suspended."""

    def __init__(self, ask_scheduler: Callable[[], bool] | None) -> None:
        """`ask_scheduler` may take a minute; None if there is no scheduler to ask."""
        self._ask_scheduler = ask_scheduler
        self._asked_at = -ASK_SCHEDULER_S
        self._answer = False  # what the scheduler said when it was last asked

    async def is_seen(self, guards_here: Sequence[int], now: float) -> bool:
        """Whether the job is suspended, by its processes of this host or else by its scheduler.

        `guards_here` are the process ids of the guards on this host. `now` is in seconds, by any clock.
        """
        # A guard that is stopped when its program has ended is no sign of it: the program was not stopped.
        if guards_here and all(map(_is_stopped, guards_here)) and any(map(_has_program, guards_here)):
            return True
        if self._ask_scheduler is None:
            return False
        if now >= self._asked_at + ASK_SCHEDULER_S:
            self._asked_at = now
            self._answer = await answer_within(SCHEDULER_ANSWER_S, self._ask_scheduler)
        return self._answer


def _is_stopped(guard: int) -> bool:
    """Whether a guard of this host and all that it has started are stopped (state T)."""
    pids = [guard, *processes.descendants(guard)]
    stats = [processes.process_stat(pid) for pid in pids]
    if stats[0] is None or any(stat is not None and stat.state not in "TtZX" for stat in stats):
        return False
    # A guard's container numbers its processes itself: is this the guard? Only a process that is stopped is
    # asked: of one that hangs in the kernel this question may hang, too.
    try:
        return b"allranks.launch.guard" in Path(f"/proc/{guard}/cmdline").read_bytes()
    except OSError:
        return False


def _has_program(guard: int) -> bool:
    """Whether something that a guard of this host has started has not ended."""
    stats = [processes.process_stat(pid) for pid in processes.descendants(guard)]
    return any(stat is not None and stat.state not in "ZX" for stat in stats)


async def answer_within(within_s: float, ask: Callable[[], bool]) -> bool:
    """What `ask` returns; False if it does not return within `within_s` seconds.

    `ask` is called on a thread, because it may block. A thread that hangs does not keep this process from
    ending.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bool] = loop.create_future()

    def take(value: bool) -> None:
        if not answer.done():
            answer.set_result(value)

    def work() -> None:
        value = ask()
        with contextlib.suppress(RuntimeError):  # the launch is over, and with it the loop
            loop.call_soon_threadsafe(take, value)

    threading.Thread(target=work, daemon=True).start()
    with contextlib.suppress(asyncio.TimeoutError):
        return await asyncio.wait_for(answer, within_s)
    return False
