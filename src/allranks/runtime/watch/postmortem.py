"""What has become of a process on this host: how it has ended, whether it is stopped, where its program is.

A rank's neighbour looks here when the rank has died or does not answer. The process itself need not do
anything for that, so it may be dead, stopped, or stuck in a call that keeps Python's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback

from allranks.base import processes
from allranks.base.processes import DUMP_SIGNAL, ProcessIdentity, ProcessStat
from allranks.runtime.watch.verdict import FROM_AFAR, Known, Peer

LOOK_S = 1.0  # how long a process may take to write down its stack
_DEAD = "ZX"  # the states of a process that has ended
STACK_FRAMES = 12  # the innermost ones: where the program is, and how it came there


# --- this process makes itself visible ----------------------------------------------------------------


def offer_stack() -> int | None:
    """Lets other processes of this user have this one's Python stack: the descriptor to read it from.

    The descriptor leads to a file in memory. None if there is no such thing (not on Linux).
    """
    if sys.platform != "linux":
        return None
    dump_fd = os.memfd_create("allranks-stack")
    # faulthandler's handler is written in C: it works where the main thread keeps Python's lock.
    # It writes the stack of the thread that gets the signal, which does nothing else meanwhile. To read the
    # stack of a thread that runs on could crash the process.
    faulthandler.register(DUMP_SIGNAL, file=dump_fd, all_threads=False)
    return dump_fd


def withdraw_stack(dump_fd: int) -> None:
    """Takes back what offer_stack() gave."""
    faulthandler.unregister(DUMP_SIGNAL)
    os.close(dump_fd)


def own_stack(thread: int) -> str:
    """The innermost Python frames of a thread of this process, as text of several lines."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)[-STACK_FRAMES:]).rstrip()


# --- another process ----------------------------------------------------------------------------------


def look(peer: Peer, here: ProcessIdentity, known: Known) -> str:
    """What has become of a rank's process, in words that follow the rank's name; "" if nothing is wrong.

    `here` is this process, and `known` says why the rank is looked at. If its connection has ended (GONE),
    the words say how the process ended. If the process is stopped, they say that, with its Python stack.
    For a process that runs but has not answered they are empty at first (MUTE), and later "does not answer"
    with its stack (STUCK). If this process cannot see the other one, which is on another host or in another
    container, they are FROM_AFAR[known].
    """
    stat = _stat(peer.process, here)
    if stat is None:
        return FROM_AFAR[known]

    if known is Known.GONE:
        return _how_it_ended(stat)

    is_stopped = stat.state in "Tt"
    if known is Known.MUTE and not is_stopped:
        return ""

    found = "is stopped (state T)" if is_stopped else FROM_AFAR[known]
    stack = ""
    if peer.dump_fd is not None:
        with contextlib.suppress(OSError):  # it has ended meanwhile, or this process may not look
            stack = _stack_of(peer, here, peer.dump_fd)
    return f"{found}. It is at\n{stack}" if stack else found


def kill(process: ProcessIdentity, here: ProcessIdentity) -> None:
    """Kills this process, and no other that has got its number meanwhile or has it elsewhere."""
    send(process, here, signal.SIGKILL)


def send(process: ProcessIdentity, here: ProcessIdentity, signum: int) -> None:
    """Sends a signal to this very process, if it is there and can be seen from `here`."""
    if _stat(process, here) is not None and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signum)


def _stat(process: ProcessIdentity, here: ProcessIdentity) -> ProcessStat | None:
    """What Linux knows of exactly this process. It may be dead, if its parent has not waited for it yet.

    None if it is gone, if it is on another host or in another container, or if its number belongs to a
    process that was started later.
    """
    if process.pid is None or not process.is_visible_from(here):
        return None
    stat = processes.process_stat(process.pid)
    if stat is None or stat.started_ticks != process.started_ticks:
        return None
    return stat


def _how_it_ended(stat: ProcessStat) -> str:
    """How a process has ended that is gone. Linux knows until its parent, the launcher, has asked."""
    status = stat.wait_status
    if status == 0 and stat.state not in _DEAD:
        return FROM_AFAR[Known.GONE]
    signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return processes.how_it_ended(os.WEXITSTATUS(status), signum)


def _stack_of(peer: Peer, here: ProcessIdentity, dump_fd: int) -> str:
    """The main thread's Python stack, innermost frames last. Leaves the process stopped.

    Raises OSError if the process has ended or belongs to somebody else.
    """
    pid = peer.process.pid
    assert pid is not None  # it was found a moment ago
    deadline = time.monotonic() + LOOK_S
    written = ""
    before = None
    with open(f"/proc/{pid}/fd/{dump_fd}") as file:  # noqa: PTH123
        # The signal goes to the main thread itself (glibc 2.30): any other thread may take a signal for the
        # process, and by then the main thread may have gone on.
        tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
        if tgkill is None:
            os.kill(pid, DUMP_SIGNAL)
        else:
            tgkill(pid, pid, DUMP_SIGNAL)
        send(peer.process, here, signal.SIGCONT)  # a stopped process handles no signal

        # The dump is whole once it has not grown for 20 ms.
        while (not written or written != before) and time.monotonic() < deadline:
            time.sleep(0.02)
            before = written
            written += file.read()
        send(peer.process, here, signal.SIGSTOP)  # its training must not go on

    # faulthandler writes "Stack (most recent call first):", and the innermost frame first.
    frames = written.partition("call first):\n")[2].splitlines()[:STACK_FRAMES]
    return "\n".join(reversed(frames))
