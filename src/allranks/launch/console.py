"""The user's console: what the ranks say, in whole lines, and what `allranks launch` says itself.

Nobody here waits for the console. A terminal that was stopped with Ctrl-S, a pipe whose reader sleeps and a
file system that hangs make a write wait for as long as they like, and the supervisor has ranks to watch
over meanwhile. So a thread does the writing.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from allranks.base import terminal
from allranks.base.errors import as_line

STDOUT, STDERR = 1, 2
FD_OF = {"out": STDOUT, "err": STDERR}

HOLD_S = 0.5  # other ranks' lines wait so long for the end of rank 0's line
FULL_BYTES = 8 << 20  # waiting to be written: from then on the ranks wait until the console has caught up
WRITE_BYTES = 1 << 16  # a pipe takes as much at once
LONGEST_LINE_BYTES = 64 << 20  # a longer line is cut, as it has to be kept until it ends
# How the output of a training ends while rank 0's progress bar is shown, and what erases that bar.
BAR_END = terminal.RESTORE_CURSOR.encode()
ERASE_BAR = terminal.ERASE_BELOW.encode()


def say(text: str, within_s: float | None = None) -> None:
    """One line to the user, on stderr. Waits until it is written, or for `within_s` seconds."""
    _write_now(STDERR, as_line(text, STDERR), within_s)


def tell(text: str) -> None:
    """One line on stdout, where it belongs to the command's result."""
    _write_now(STDOUT, f"{text}\n", None)


def note(text: str) -> None:
    """One line on stderr that is not an error, wrapped where stderr is a terminal."""
    columns = terminal.columns_of(STDERR)
    if columns is not None:
        text = terminal.wrapped(text, min(columns, terminal.MOST_COLUMNS), indent="  ")
    _write_now(STDERR, f"{text}\n", None)


def _write_now(fd: int, text: str, within_s: float | None) -> None:
    writer = Writer()
    writer.put(fd, text.encode(errors="surrogateescape"))
    writer.close(within_s)


def terminals() -> str:
    """Which of "out" and "err" end at a terminal here: `out err`, one of them, or nothing."""
    return " ".join(kind for kind, fd in FD_OF.items() if os.isatty(fd))


class Size(NamedTuple):
    """The size of a terminal, in characters."""

    rows: int
    columns: int


def terminal_size() -> Size | None:
    """The size of the terminal that stdout or stderr ends at; None if neither does."""
    for fd in FD_OF.values():
        with suppress(OSError):
            size = os.get_terminal_size(fd)
            return Size(size.lines, size.columns)
    return None


class Piece(NamedTuple):
    """Some bytes that are to be written to a descriptor."""

    fd: int
    data: bytes


class Writer:
    """Writes to this process's stdout and stderr, in threads that start with the first piece.

    There is a thread for each of the two, so that one that takes nothing does not hold up the other. If
    both lead to the same file or terminal one thread writes to it, and all pieces keep their order.
    """

    def __init__(self) -> None:
        self.nobody_reads = False  # the other end of a pipe has been closed
        # Called from a thread whenever it has written something, or has found that nobody reads.
        self.on_progress: Callable[[], None] = lambda: None
        # By the stream whose thread writes them. `_news` guards these and the two below.
        self._pieces: dict[int, deque[Piece]] = {}
        self._waiting_bytes = {STDOUT: 0, STDERR: 0}
        self._is_closed = False
        self._news = threading.Condition()
        self._threads: dict[int, threading.Thread] = {}

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that the ranks' output should wait, too."""
        return max(self._waiting_bytes.values()) > FULL_BYTES

    @property
    def waiting_bytes(self) -> int:
        """How many bytes are not written yet."""
        return sum(self._waiting_bytes.values())

    def put(self, fd: int, data: bytes) -> None:
        """Queues the bytes, to be written after all that came before them. Returns at once."""
        with self._news:
            if self.nobody_reads or not data:
                return
            lane = STDOUT if fd == STDERR and _lead_to_the_same(STDOUT, STDERR) else fd
            self._pieces.setdefault(lane, deque()).append(Piece(fd, data))
            self._waiting_bytes[lane] += len(data)
            if lane not in self._threads:
                # As a daemon: the process may end while a write still waits.
                self._threads[lane] = threading.Thread(target=self._work, args=(lane,), daemon=True)
                self._threads[lane].start()
            self._news.notify_all()

    def close(self, within_s: float | None = None) -> None:
        """Waits until all is written, but no longer than `within_s` seconds."""
        with self._news:
            self._is_closed = True
            self._news.notify_all()
        for thread in self._threads.values():
            thread.join(within_s)

    def _work(self, lane: int) -> None:
        """What the thread of a stream does."""
        pieces = self._pieces[lane]
        while True:
            with self._news:
                while not pieces and not self._is_closed:
                    self._news.wait()
                if not pieces:
                    return
                piece = _next_piece(pieces)
            self._write(piece)
            with self._news:
                self._waiting_bytes[lane] -= len(piece.data)
                if self.nobody_reads:
                    pieces.clear()
                    self._waiting_bytes[lane] = 0
            self.on_progress()

    def _write(self, piece: Piece) -> None:
        data = piece.data
        while data:
            try:
                data = data[os.write(piece.fd, data) :]
            except BlockingIOError:  # another process that shares this pipe wants writes not to wait
                time.sleep(0.01)
            except BrokenPipeError:
                self.nobody_reads = True
                return
            except OSError:  # a full disk under the job's log: no reason to end the training
                return


def _next_piece(pieces: deque[Piece]) -> Piece:
    """The first piece, together with those after it for the same stream: one write instead of many."""
    fd = pieces[0].fd
    data: list[bytes] = []
    size = 0
    while pieces and pieces[0].fd == fd and size < WRITE_BYTES:
        data.append(pieces.popleft().data)
        size += len(data[-1])
    return Piece(fd, b"".join(data))


@functools.cache
def _lead_to_the_same(one: int, other: int) -> bool:
    """Whether two descriptors lead to one file, pipe or terminal; True if that is not known.

    Their names are compared. os.fstat() would ask the file's file system, which may hang.
    """
    try:
        return os.readlink(f"/proc/self/fd/{one}") == os.readlink(f"/proc/self/fd/{other}")  # noqa: PTH115
    except OSError:  # one of them is closed, or there is no /proc
        return True


class Console:
    """Rank 0's bytes as they come; all other lines whole, and between rank 0's lines."""

    def __init__(self, write: Callable[[int, bytes], None]) -> None:
        """`write(fd, data)` takes the bytes for stdout or stderr, and does not wait."""
        self._write = write
        self._open_since: dict[int, float] = {}  # rank 0's streams that are within a line, since when
        self._begun: dict[tuple[int, str], bytearray] = {}  # other ranks' lines that have not ended yet
        self._with_bar: set[int] = set()  # rank 0's streams that have a progress bar below the cursor
        self._held: list[Piece] = []  # whole lines that wait for the end of rank 0's
        self._held_since = 0.0  # when the first of them came

    @property
    def is_holding(self) -> bool:
        """Whether lines wait for the end of rank 0's: then flush() is to be called after HOLD_S."""
        return bool(self._held)

    def show(self, rank: int, host: str, kind: str, data: bytes) -> None:
        """What a rank has written to its stdout (`kind` is "out") or stderr ("err")."""
        if rank == 0:
            self._show_rank_0(FD_OF[kind], data)
            return
        line = self._begun.setdefault((rank, kind), bytearray())
        line += data
        # Only what is new can hold a line's end: a long line is not looked through again and again.
        if b"\n" not in data and len(line) < LONGEST_LINE_BYTES:
            return
        *whole, rest = bytes(line).split(b"\n")
        if len(rest) >= LONGEST_LINE_BYTES:
            whole, rest = [*whole, rest], b""
        self._begun[rank, kind] = bytearray(rest)
        name = f"[rank {rank} on {host}] ".encode()
        for text in whole:  # our own training names rank and host itself
            self.line(text + b"\n" if text.startswith(name) else name + text + b"\n", FD_OF[kind])

    def _show_rank_0(self, fd: int, data: bytes) -> None:
        self._write(fd, data)
        self._open_since.pop(fd, None)
        if data.endswith(BAR_END):
            # A progress bar stands below the cursor, which is where the next line begins.
            self._with_bar.add(fd)
        else:
            self._with_bar.discard(fd)
            if not data.endswith(b"\n"):
                self._open_since[fd] = time.monotonic()
        self.flush()

    def end_lines_of(self, rank: int, host: str) -> None:
        """Ends the lines that the rank has begun: it has ended itself."""
        for kind in FD_OF:
            if self._begun.get((rank, kind)):
                self.show(rank, host, kind, b"\n")

    def line(self, line: bytes, fd: int = STDERR) -> None:
        """A whole line of somebody else than rank 0."""
        if not self._held:
            self._held_since = time.monotonic()
        self._held.append(Piece(fd, line))
        self.flush()

    def flush(self, force: bool = False) -> None:
        """Writes the other ranks' lines that wait. They wait while rank 0 is in the middle of a line.

        They wait at most HOLD_S after rank 0 has last added to its line, and at most HOLD_S in all. The
        second limit is for a rank 0 that adds to its line without end, as an ordinary progress bar does.
        With `force` they are written at once.
        """
        if not self._held:
            return
        now = time.monotonic()
        is_within_line = any(now - since < HOLD_S for since in self._open_since.values())
        if is_within_line and now - self._held_since < HOLD_S and not force:
            return
        for fd in self._open_since:
            self._write(fd, b"\n")
        self._open_since.clear()
        for fd in self._with_bar:  # rank 0 draws it again in a moment, below these lines
            self._write(fd, ERASE_BAR)
        self._with_bar.clear()
        held, self._held = self._held, []
        for piece in held:
            self._write(*piece)
