"""The ranks' output on its way to the console, which may take it more slowly than it comes.

While too much waits for the console, the ranks' output waits, too: the supervisor reads no more of it, then
the guards do not, and in the end the programs wait with their next line. So the memory that is needed stays
small. Once the launch ends nobody waits for the console any more: the ranks have to save in time, and what
they write meanwhile is left out if the console is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from allranks.base.errors import as_line
from allranks.launch.arrivals import Guarded
from allranks.launch.console import HOLD_S, STDERR, Console, Writer
from allranks.launch.outcome import Rank

UNREAD_S = 2.0  # how long a console that takes nothing is waited for after a signal
# How much output of each rank is still read while the console is full: its last messages, and how it ended.
LAST_WORDS_BYTES = 1 << 14


class Output:
    """Shows what the ranks write, and what the supervisor says itself."""

    def __init__(
        self,
        console: Console,
        writer: Writer | None = None,
        on_output: Callable[[Rank, str, bytes], None] | None = None,
    ) -> None:
        """`writer` is the one behind the console; without one the console is never full.

        `on_output` takes what the ranks write, instead of the console.
        """
        self._console = console
        self._writer = writer
        self._on_output = on_output
        self._may_be_left_out = False  # whether the launch is ending, so that output need not be shown
        self._room = asyncio.Event()  # set while the console takes more
        self._room.set()

    def start(self, on_nobody_reads: Callable[[], None]) -> None:
        """Called once, in the event loop; calls `on_nobody_reads` when the console's reader has gone."""
        loop = asyncio.get_running_loop()
        if self._writer is None:
            return

        def look() -> None:
            if not self.is_full:
                self._room.set()
            if self.nobody_reads:
                on_nobody_reads()

        def tell_loop() -> None:  # called from the writer's thread
            with contextlib.suppress(RuntimeError):  # the launch is over, and with it the loop
                loop.call_soon_threadsafe(look)

        self._writer.on_progress = tell_loop

    @property
    def is_full(self) -> bool:
        return self._writer is not None and self._writer.is_full

    @property
    def nobody_reads(self) -> bool:
        return self._writer is not None and self._writer.nobody_reads

    def say(self, text: str) -> None:
        """Shows a line of the supervisor's own."""
        self.line(as_line(text, STDERR).encode())

    def line(self, line: bytes) -> None:
        """Shows a whole line of somebody else than a rank, on stderr."""
        self._console.line(line)

    def end_lines_of(self, r: Rank) -> None:
        """Ends the lines that a rank has begun: it has ended itself."""
        self._console.end_lines_of(r.rank, r.host)

    def flush(self) -> None:
        """Hands the console all lines that still wait for the end of rank 0's line."""
        self._console.flush(force=True)

    def show(self, known: Guarded, kind: str, data: bytes) -> None:
        """Takes what a rank has written to its stdout (`kind` is "out") or stderr ("err")."""
        if self.is_full:
            if self._may_be_left_out:
                return  # nobody reads, and the ranks must not wait for that before they save
            known.beyond_bytes += len(data)
        if self._on_output is not None:
            self._on_output(known.rank, kind, data)
        else:
            self._console.show(known.rank.rank, known.rank.host, kind, data)
        if self._console.is_holding:
            asyncio.get_running_loop().call_later(HOLD_S, self._console.flush)
        if self.is_full and not self._may_be_left_out:
            self._room.clear()

    async def until_room(self, known: Guarded) -> None:
        """Waits while the console is full and the rank has said more than its last words since."""
        if known.beyond_bytes < LAST_WORDS_BYTES:
            return
        known.awaits_room = True
        await self._room.wait()
        known.awaits_room = False
        known.beyond_bytes = 0
        known.heard_at = asyncio.get_running_loop().time()

    def wait_no_more(self) -> None:
        """The launch is ending: no rank waits for the console from now on."""
        self._may_be_left_out = True
        self._room.set()

    async def until_written(self, is_in_a_hurry: Callable[[], bool]) -> None:
        """Waits until the console has taken all output.

        While `is_in_a_hurry()` is true, as after a signal, gives up once the console has taken nothing for
        UNREAD_S.
        """
        if self._writer is None:
            return
        left = self._writer.waiting_bytes
        progress_at = time.monotonic()
        while self._writer.waiting_bytes:
            await asyncio.sleep(0.01)
            if self._writer.waiting_bytes != left:
                left = self._writer.waiting_bytes
                progress_at = time.monotonic()
            if is_in_a_hurry() and time.monotonic() > progress_at + UNREAD_S:
                return
        self._writer.close()
