"""What the ranks say, on the user's console: whole lines, rank 0's as they come."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass

from allranks.base import links, processes

HOLD_S = 0.5  # other ranks' lines wait so long for the end of rank 0's line


@dataclass
class Rank:
    """What is known of a rank."""

    rank: int
    host: str
    guard: asyncio.StreamWriter | None  # None: its connection has ended
    code: int | None = None  # None: still running
    signal: int = 0
    ended_at: float = 0.0  # by its host's clock
    ended: bool = False  # with all of its output here, or no more to come
    lost: bool = False

    def how_it_ended(self) -> str:
        if self.lost:
            return "vanished without a word: its guard was killed, or its node went down"
        assert self.code is not None
        return processes.how_it_ended(self.code, self.signal)


def say(text: str) -> None:
    Console().write(2, f"allranks: {text}\n".encode())


class Console:
    """Rank 0's bytes as they come, all other lines whole and between rank 0's lines."""

    def __init__(self) -> None:
        self.unread = False  # nobody reads any more
        self._in_line: dict[int, float] = {}  # rank 0's streams that have begun a line, since when
        self._partial: dict[tuple[int, str], bytes] = {}  # other ranks' lines that are not whole yet
        self.held: list[bytes] = []

    def show(self, r: Rank, kind: str, data: bytes) -> None:
        """What a rank wrote to its stdout ("out") or stderr ("err")."""
        if r.rank == 0:
            fd = 1 if kind == "out" else 2
            self.write(fd, data)
            self._in_line.pop(fd, None)
            if not data.endswith(b"\n"):
                self._in_line[fd] = time.monotonic()
            self.flush()
            return
        *lines, rest = (self._partial.pop((r.rank, kind), b"") + data).split(b"\n")
        if len(rest) > links.LONGEST_MESSAGE_BYTES:
            lines, rest = [*lines, rest], b""
        if rest:
            self._partial[r.rank, kind] = rest
        me = f"[rank {r.rank} on {r.host}] ".encode()
        for line in lines:  # our own training names rank and host itself
            self.line((b"" if line.startswith(me) else me) + line + b"\n")

    def ended(self, r: Rank) -> None:
        """Ends the lines that the rank has begun."""
        for number, kind in list(self._partial):
            if number == r.rank:
                self.show(r, kind, b"\n")

    def line(self, line: bytes) -> None:
        self.held.append(line)
        self.flush()

    def flush(self, force: bool = False) -> None:
        """Writes the lines that wait, once rank 0's line has ended or has taken too long."""
        if not self.held:
            return
        if any(time.monotonic() - since < HOLD_S for since in self._in_line.values()) and not force:
            return
        for fd in self._in_line:
            self.write(fd, b"\n")
        self._in_line.clear()
        lines, self.held = self.held, []
        self.write(2, b"".join(lines))

    def terminals(self) -> str:
        """Which of rank 0's streams end at a terminal."""
        return " ".join(kind for fd, kind in ((1, "out"), (2, "err")) if os.isatty(fd))

    def write(self, fd: int, data: bytes) -> None:
        while data and not self.unread:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:  # somebody else who has this pipe, too, wants it like that
                time.sleep(0.01)
            except BrokenPipeError:
                self.unread = True
            except OSError:  # a full disk under the job's log: no reason to end the training
                return
