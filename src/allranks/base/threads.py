"""Work on a thread of its own that the end of the process hardly waits for.

The threads of concurrent.futures are waited for: a process that is to end with an error, or by Ctrl-C,
would go on until its files are read, however long their file system takes.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

# How long the end of the process waits for its threads. A thread that still works while Python shuts down
# may crash the process.
END_S = 1.0

Result = TypeVar("Result")

_threads: list[threading.Thread] = []
_process_ends = threading.Event()


def in_thread(work: Callable[[], Result], name: str) -> Future[Result]:
    """Begins `work` on a daemon thread. The future has what it returns, or raises what it raises.

    Work that takes long should look at process_ends() now and then.
    """
    _leave_in_order()
    future: Future[Result] = Future()

    def run() -> None:
        nonlocal work
        try:
            tell = functools.partial(future.set_result, work())
        except BaseException as error:  # noqa: BLE001  raised again where the result is asked for
            tell = functools.partial(future.set_exception, error)
        # What the work holds, such as a copy of a model, is freed before anybody may take the work for
        # done, and end the process. Freeing tensors while Python shuts down aborts the process.
        del work
        tell()

    thread = threading.Thread(target=run, name=name, daemon=True)
    # A run begins a thread for each of its saves: one that has ended need not be waited for any more. A
    # thread does not leave the list by itself, because it would leave before it has really ended.
    for each in list(_threads):
        if each.ident is not None and not each.is_alive():
            with suppress(ValueError):  # another thread has removed it
                _threads.remove(each)
    _threads.append(thread)
    thread.start()
    return future


def process_ends() -> bool:
    """Whether this process is about to end, so that nobody will ask for results any more."""
    return _process_ends.is_set()


@functools.cache
def _leave_in_order() -> None:
    """Sees to it that at its end the process tells its threads to stop, and waits a moment for them."""
    atexit.register(_end_threads)


def _end_threads() -> None:
    _process_ends.set()
    give_up_at = time.monotonic() + END_S
    for thread in list(_threads):
        thread.join(max(0.0, give_up_at - time.monotonic()))
