"""Finds out whether the scheduler has suspended the whole job, to make room for one that is more urgent.

A scheduler suspends a job by stopping all of its processes at once. `allranks launch` may run on outside of
the job, as in a shell of salloc on a login node. Then all guards are silent, but they are not lost. On this
host it can be seen whether the guards and their programs are stopped. For other hosts the scheduler is
asked.
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
        # A stopped guard whose program has ended does not show that the job is suspended: its program was
        # not stopped. So at least one of the guards must still have a program.
        are_all_stopped = bool(guards_here) and all(_is_stopped(guard) for guard in guards_here)
        if are_all_stopped and any(_has_program(guard) for guard in guards_here):
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
    # The guard may run in a container, where its number means another process than here. The command line
    # shows whether this is the guard. It is read only of a process that is stopped: to read that of a
    # process which hangs in the kernel may hang, too.
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
