"""A time limit for a call that keeps Python's lock, in which no thread of Python's can run.

MPI_Init is such a call: it returns when all ranks have come to it, and until then this process is deaf. A
helper process, forked before the call, looks at the clock instead. It ends this process with a sentence if
the call has not returned in time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Iterator

from allranks.base import processes

TERM_S = 2.0  # from SIGTERM to SIGKILL


@contextlib.contextmanager
def time_limit(limit_s: float, who: str, words: str, spare_s: float = 0.0) -> Iterator[None]:
    """Ends this process, with the sentence `who words`, if the block has not ended after `limit_s` seconds.

    If this process is stopped by then (SIGSTOP), the sentence says that instead. Several processes may come
    to their limits together, because all of them wait for the one that is stopped. That one is to be named.
    So it speaks at once, and a process that is not stopped waits `spare_s` seconds more.

    Must be entered by the main thread: the helper ends when the thread that started it ends.
    """
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside other threads, whose locks stay locked. The helper takes none.
        warnings.simplefilter("ignore", DeprecationWarning)
        helper = os.fork()
    if helper == 0:
        _help(parent, limit_s, who, words, spare_s)
    # Python notes a Ctrl-C and raises KeyboardInterrupt once it has its lock again, which may be never. So
    # meanwhile Ctrl-C ends this process at once: there is nothing to save yet.
    is_pythons = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_pythons:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_pythons:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(helper, signal.SIGKILL)
        # If a parent process has set SIGCHLD to be ignored, Linux forgets a child as soon as it ends.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(helper, 0)


def _help(parent: int, limit_s: float, who: str, words: str, spare_s: float) -> None:
    """What the helper process does. It makes plain system calls only, and takes no lock.

    A lock that another thread held at the fork stays locked here for ever.
    """
    try:
        processes.die_with_parent(parent, signal.SIGKILL)
        # A signal to the whole job must not leave the call without its limit.
        signal.pthread_sigmask(signal.SIG_BLOCK, processes.STOPPING)
        time.sleep(limit_s)

        stat = processes.process_stat(parent)
        if stat is not None and stat.state in "Tt":
            words = "is stopped (state T): all ranks end."
        else:
            time.sleep(spare_s)
        with contextlib.suppress(OSError):  # nobody may be reading any more
            os.write(2, f"allranks: {who} {words}\n".encode(errors="backslashreplace"))

        os.kill(parent, signal.SIGTERM)
        os.kill(parent, signal.SIGCONT)  # a stopped process ends only when it goes on
        time.sleep(TERM_S)
        os.kill(parent, signal.SIGKILL)  # its handler for SIGTERM may need Python's lock
    finally:
        os._exit(0)
