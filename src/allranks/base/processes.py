"""Linux's means to leave no process behind; elsewhere they do what can be done."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Set

# A run, which saves first.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2), linux/prctl.h


def die_with_parent(parent: int, signum: int) -> None:
    """In a child just forked: get `signum` when the parent process `parent` ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before we could ask
        os.kill(os.getpid(), signum)


@contextlib.contextmanager
def blocked(signals: Iterable[int]) -> Iterator[None]:
    """Not delivered to this thread meanwhile; to the processes that it starts here, never."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def adopt_orphans(yes: bool = True) -> None:
    """Descendants whose own parent ends become this process's children, where they can be found."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(yes))


def descendants(of: int) -> set[int]:
    """Process ids below `of`, zombies included; empty where there is no /proc."""
    found: set[int] = set()
    waiting = [of]
    while waiting:
        new = set(children(waiting.pop())) - found
        found |= new
        waiting += new
    return found


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # the process, or one of its threads, has just ended
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{thread}/children") as file:  # noqa: PTH123
                found += map(int, file.read().split())
    return found


def kill_descendants(spare: Set[int] = frozenset(), limit_s: float = 2.0) -> None:
    """SIGKILL to everything below this process but `spare`, until nothing is left; reaps.

    Gives up after `limit_s` seconds: what is still there then is stuck in the kernel.
    """
    deadline = time.monotonic() + limit_s
    while (left := descendants(os.getpid()) - spare) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):  # a grandchild: its parent's or, soon, ours
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)


def restore_signals() -> None:
    """Python ignores these two; a program that is not Python expects their default."""
    for name in ("SIGPIPE", "SIGXFSZ"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def cpu_affinity() -> frozenset[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
