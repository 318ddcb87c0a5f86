"""Linux's means to leave no process behind; elsewhere they do what can be done."""

from __future__ import annotations

import os
import signal
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2), linux/prctl.h


def die_with_parent(parent: int, signum: int) -> None:
    """In a child just forked: get `signum` when the parent process `parent` ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before we could ask
        os.kill(os.getpid(), signum)


def adopt_orphans(yes: bool = True) -> None:
    """Descendants whose own parent ends become this process's children, where they can be found."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(yes))


def descendants(of: int) -> set[int]:
    """Process ids below `of`, zombies included; empty where there is no /proc."""
    found: set[int] = set()
    waiting = [of]
    while waiting:
        for child in _children(waiting.pop()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def kill_descendants(spare: set[int] | None = None, limit_s: float = 2.0) -> set[int]:
    """SIGKILL to everything below this process but `spare`, until nothing is left; reaps.

    Returns what is still there after `limit_s` seconds: a process stuck in the kernel.
    """
    spare = spare or set()
    deadline = time.monotonic() + limit_s
    while True:
        left = descendants(os.getpid()) - spare
        for pid in left:
            _signal(pid, signal.SIGKILL)
        _reap(left)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.005)


def restore_signals() -> None:
    """Python ignores these two; a program that is not Python expects their default."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if hasattr(signal, "SIGXFSZ"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def _reap(pids: set[int]) -> None:
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # a grandchild: its parent or, soon, we
            continue


def _signal(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def _children(pid: int) -> list[int]:
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{thread}/children") as file:  # noqa: PTH123
                found += [int(word) for word in file.read().split()]
    except OSError:  # the process, or one of its threads, has just ended
        pass
    return found


def _prctl(option: int, value: int) -> None:
    import sys

    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
