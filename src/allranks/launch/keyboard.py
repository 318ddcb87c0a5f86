"""What the user types, or pipes into `allranks launch`: read piece by piece, as rank 0's program takes it.

So a debugger works in rank 0 (`breakpoint()` in the code), and so do programs that read their stdin.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

STDIN = 0
PIECE_BYTES = 1 << 16  # a pipe takes as much at once
BACKGROUND_S = 1.0  # how often to look whether this process has come to the terminal's foreground


class Keyboard:
    """This process's stdin, for an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_piece: Callable[[bytes], None]) -> None:
        """`on_piece` takes what was read, in the loop; empty bytes say that there is no more."""
        self._loop = loop
        self._on_piece = on_piece
        self._has_ended = False

    def read_on(self) -> None:
        """Reads one more piece. Nothing is read ahead: what the program does not take, others may."""
        if self._has_ended:
            return
        if sys.stdin is None:  # closed before we started: the number 0 may now be another file's
            self._take(b"")
        elif not _is_in_foreground():
            # Reading now would stop this process: the line that is typed is meant for the shell.
            self._loop.call_later(BACKGROUND_S, self.read_on)
        else:
            self._wait_for_piece()

    def stop(self) -> None:
        """No more is read."""
        self._has_ended = True
        with suppress(OSError, ValueError):
            self._loop.remove_reader(STDIN)

    def _wait_for_piece(self) -> None:
        try:
            self._loop.add_reader(STDIN, self._on_readable)
        except PermissionError:  # a file is always ready, and cannot be waited for; its disk may hang
            threading.Thread(target=self._read_file, daemon=True).start()

    def _on_readable(self) -> None:
        self._loop.remove_reader(STDIN)
        piece = _read() if _is_in_foreground() else None
        if piece is None:
            self.read_on()
        else:
            self._take(piece)

    def _read_file(self) -> None:
        data = _read() or b""
        with suppress(RuntimeError):  # the launch is over, and with it the loop
            self._loop.call_soon_threadsafe(self._take, data)

    def _take(self, data: bytes) -> None:
        if not data:
            self._has_ended = True
        self._on_piece(data)


def _is_in_foreground() -> bool:
    """Whether a line that is typed at the terminal is for this process; True if stdin is none."""
    try:
        return os.tcgetpgrp(STDIN) == os.getpgrp()
    except OSError:  # no terminal, or not the one that controls this process
        return True


def _read() -> bytes | None:
    """The next piece, empty at the end; None if there is none just now."""
    try:
        return os.read(STDIN, PIECE_BYTES)
    except BlockingIOError:  # another process has set it to non-blocking, and has perhaps read the piece
        return None
    except OSError:  # a terminal that has gone: no more will come
        return b""
