"""The processes that read a user's Dataset for a rank: what they need to start, and what ended them.

torch's DataLoader starts them (data.workers of the configuration). A worker hands a batch over in shared
memory, and sends word of it through a socket. If either cannot be had, it fails on a thread of its own:
torch prints the error there and loses the batch, and the rank waits for it for ever. Here such a worker
ends, which torch notices, and the rank says in one sentence why.
"""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allranks.base import processes
from allranks.base.errors import RunError, UserError
from allranks.base.text import one_line

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

_SOCKET_PATH_BYTES = 107  # the longest address of a Unix socket (unix(7)), without the zero at its end
# What multiprocessing puts below the folder for temporary files: a folder, and in it a socket.
_SOCKET_NAME = "/pymp-12345678/listener-12345678"
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED_BYTES = 64 << 10  # the semaphores between a rank and two workers take about 40 KiB
_NO_SHARED_MEMORY = re.compile(r"unable to [^\n]*torch_[^\n]*")  # torch's message, which names the file


class Workers:
    """The worker processes of one Dataset on one rank; `count` of them at a time, 0 for none.

    `key` is what the user calls their number, for messages.
    """

    def __init__(self, count: int, key: str = "data.workers") -> None:
        self.count = count
        self.key = key
        self.started: Sequence[BaseProcess] = ()  # those that read now, or have read last

    @cached_property
    def _reasons(self) -> tuple[Connection, Connection]:
        """(for the rank, for its workers): a pipe through which a worker says why it ends itself."""
        return multiprocessing.Pipe(duplex=False)

    def _check_names_of_sockets(self) -> None:
        folder = tempfile.gettempdir()
        length = len(os.fsencode(folder + _SOCKET_NAME))
        if length > _SOCKET_PATH_BYTES:
            raise UserError(
                f"{self.key}={self.count} needs sockets below TMPDIR={folder}, whose names would have "
                f"{length} bytes, and a socket's name has at most {_SOCKET_PATH_BYTES}: set TMPDIR to a "
                f"folder with a shorter name, such as /tmp, or give {self.key}=0."
            )

    def _check_shared_memory(self) -> None:
        if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free < _LEAST_SHARED_BYTES:
            raise UserError(
                f"{self.key}={self.count}: the processes that read the data cannot start: "
                f"{_with_remedy(os.strerror(errno.ENOSPC), self.key)}"
            )

    def begin(self) -> partial[None]:
        """What each worker is to call before anything else, as DataLoader's worker_init_fn."""
        return partial(_begin, self._reasons[1])

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Starts of worker processes go into this block.

        Raises UserError if they cannot start, or could not hand a batch over.

        A scheduler sends its signals to all processes of a job. A rank saves first, and needs its batches
        for that: so processes that are started here never get these signals.
        """
        if self.count and sys.platform == "linux":
            self._check_names_of_sockets()
            self._check_shared_memory()
        try:
            with processes.blocked(processes.STOPPING):
                yield
        except OSError as error:
            raise UserError(
                f"{self.key}={self.count}: the processes that read the data cannot start: "
                f"{_with_remedy(str(error.strerror), self.key)}"
            ) from error

    def read(self, loader: Any) -> Iterator[Any]:
        """The batches of a DataLoader, whose processes start now. Raises UserError if they cannot.

        Not a generator: a DataLoader draws from torch's generator when it starts, which is to be now.
        """
        with self.starting():
            batches = iter(loader)
        self.started = getattr(batches, "_workers", ())
        return batches

    @contextmanager
    def explained(self) -> Iterator[None]:
        """All that runs while workers read goes into this block.

        When a worker has ended, torch raises a RuntimeError in the rank's main thread, wherever that is at
        the moment. This block turns it into a RunError that names the cause.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_about_a_worker(str(error)):
                raise
            raise RunError(
                f"A process that reads the data has ended ({self.key}={self.count}): "
                f"{_with_remedy(self._reason(str(error)), self.key)}"
            ) from error

    def _reason(self, said: str) -> str:
        """Why a worker has ended: in its own words, in torch's, or by how it ended."""
        if self._reasons[0].poll():
            return self._reasons[0].recv_bytes().decode()
        if _NO_SHARED_MEMORY.search(said):
            return one_line(_NO_SHARED_MEMORY.findall(said)[-1])
        codes = [process.exitcode for process in self.started if process.exitcode]
        return processes.how_it_ended(max(codes[0], 0), max(-codes[0], 0)) if codes else "it said nothing"


def _begin(reasons: Connection, _worker: int) -> None:
    """Prepares a worker, in its own process, before it reads anything."""
    from multiprocessing.queues import Queue

    # However its rank ends, a worker ends with it.
    processes.die_with_parent(os.getppid(), signal.SIGKILL)
    # multiprocessing calls this on the thread that sends a batch, where that has failed.
    Queue._on_queue_feeder_error = staticmethod(partial(_end, reasons))  # type: ignore[attr-defined]


def _end(reasons: Connection, error: BaseException, _batch: Any) -> None:
    """Ends a worker whose batch cannot be sent, from within its process, and tells the rank why."""
    reasons.send_bytes(f"{type(error).__name__}: {one_line(error)}"[:500].encode())
    os._exit(1)


def _is_about_a_worker(said: str) -> bool:
    """Whether torch says that a worker has ended, or that it could not put its batch into shared memory."""
    has_ended = "DataLoader worker (pid" in said
    has_no_memory = "DataLoader worker process" in said and bool(_NO_SHARED_MEMORY.search(said))
    return has_ended or has_no_memory


def _with_remedy(reason: str, key: str) -> str:
    if "Too many open files" in reason:
        remedy = f"Raise the limit by `ulimit -n`, or give fewer {key}"
    elif "SIGBUS" in reason or "No space left" in reason:
        usage = shutil.disk_usage(_SHARED_MEMORY)
        free, total = (f"{size / 2**20:,.1f} MiB" for size in (usage.free, usage.total))
        remedy = (
            f"{_SHARED_MEMORY}, through which its batches pass, has {free} free of {total}: make it larger "
            f"(docker run --shm-size=1g), or give {key}=0"
        )
    elif "SIGKILL" in reason:
        remedy = f"Give fewer {key}"
    else:
        remedy = f"Try {key}=0, which reads in the rank itself"
    return f"{reason}. {remedy}."


@atexit.register
def _end_workers() -> None:
    """Kills workers that still read when Python ends: multiprocessing would send SIGTERM and wait."""
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take this for their failure
    for child in left:
        child.kill()
