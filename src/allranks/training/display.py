"""Rank 0's console: whole lines, and at a terminal a progress bar below them.

The bar stands on the line below the cursor, and the cursor stays where the next line begins. So whatever
else writes to the terminal (a print() in a user's model, a library) writes above the bar and not into it.
Before a line of our own the bar is erased, and afterwards drawn anew.

Nothing here needs to be undone: the cursor stays visible, and there is no thread. A rank may be killed at
any moment, and the user's terminal must be as it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple, TextIO

from allranks.base import terminal
from allranks.base.terminal import ERASE_BELOW, RESTORE_CURSOR

DRAW_EVERY_S = 0.1  # often enough to look alive, seldom enough to cost nothing
WINDOW_S = 5.0  # the speed shown is that of so many seconds
LEAST_BAR_COLUMNS, MOST_BAR_COLUMNS = 6, 40

# Makes room for a line below the cursor, remembers where the cursor is, and goes down to the line's
# beginning. "Index" moves down without going to the beginning of the line, and scrolls at the last line.
_INDEX, _UP, _SAVE_CURSOR, _DOWN_TO_BEGINNING = "\x1bD", "\x1b[A", "\x1b7", "\x1b[B\r"
_BELOW = ERASE_BELOW + _INDEX + _UP + _SAVE_CURSOR + _DOWN_TO_BEGINNING


class Display:
    """A stream that people read: a terminal, or a file that is read later."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        try:
            self._fd = stream.fileno()
        except (OSError, ValueError):  # as where a notebook or a test takes the place of stdout
            self._fd = -1
        self.is_live = terminal.obeys(self._fd)
        self.shows_colours = terminal.shows_colours(self._fd)
        self._bar = ""  # that is drawn now

    @property
    def columns(self) -> int | None:
        """The terminal's width now: its window may change; None for no terminal."""
        return terminal.columns_of(self._fd)

    @property
    def is_unicode(self) -> bool:
        """Whether the stream takes the signs of the bar."""
        return (getattr(self.stream, "encoding", None) or "").lower().replace("-", "") == "utf8"

    def write_line(self, text: str) -> None:
        """Writes a line, above the bar if there is one. Raises OSError."""
        if self._bar:
            self._write(f"{ERASE_BELOW}{text}\n{_BELOW}{self._bar}{RESTORE_CURSOR}")
        else:
            self._write(f"{text}\n")

    def draw(self, bar: str) -> None:
        """Draws the bar, one line, in the place of an earlier one."""
        self._bar = bar
        with suppress(OSError):  # the terminal has gone: no reason to end a training
            self._write(f"{_BELOW}{bar}{RESTORE_CURSOR}")

    def clear(self) -> None:
        """Erases the bar."""
        if self._bar:
            self._bar = ""
            with suppress(OSError):
                self._write(ERASE_BELOW)

    def _write(self, text: str) -> None:
        self.stream.write(text)  # in one piece: another process may write to the same terminal
        self.stream.flush()


# --- the bar ------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """How far a run has come."""

    epoch: int  # that is under way, from 1
    epochs: int
    step: int  # done in the epoch
    steps: int  # of the epoch
    samples_per_s: float | None = None  # None: not known yet
    epoch_left_s: float | None = None
    run_left_s: float | None = None


def bar_text(now: Moment, columns: int, is_unicode: bool, shows_colours: bool) -> str:
    """The progress bar as one line of less than `columns` characters.

    The bar itself takes what the words leave. Where little is left, words are shortened or left out.
    """
    # The last column stays free: some terminals begin a new line after a character there.
    room = min(columns - 1, terminal.MOST_COLUMNS)
    before = f"  epoch {now.epoch}/{now.epochs}  "
    after = next(
        (words for words in _words_after(now) if len(before) + LEAST_BAR_COLUMNS + len(words) <= room), ""
    )
    length = min(max(room - len(before) - len(after), 0), MOST_BAR_COLUMNS)
    filled = length * now.step // max(now.steps, 1)
    full, empty = ("━", "─") if is_unicode else ("#", "-")
    done, left = full * filled, empty * (length - filled)
    if shows_colours:
        done, left = terminal.painted(done, terminal.CYAN), terminal.painted(left, terminal.DIM)
    return f"{before}{done}{left}{after}"[: None if shows_colours else room]


def _words_after(now: Moment) -> Iterator[str]:
    """What stands after the bar, the longest first."""
    share = f"  {100 * now.step // max(now.steps, 1):3d} %"
    if now.samples_per_s is None or now.epoch_left_s is None or now.run_left_s is None:
        yield share
        return
    speed = f"{now.samples_per_s:,.0f}"
    epoch_left, run_left = (terminal.short_duration(s) for s in (now.epoch_left_s, now.run_left_s))
    yield f"{share}  {speed} samples/s  left: epoch {epoch_left}, run {run_left}"
    yield f"{share}  {speed}/s  left: {epoch_left}, run {run_left}"
    yield f"{share}  {speed}/s  run {run_left}"
    yield share


class Pace:
    """How fast steps are taken, over the last WINDOW_S seconds."""

    def __init__(self, step: int, now_s: float) -> None:
        """`step` is the step at which the clock, in seconds, shows `now_s`."""
        self._seen: deque[tuple[float, int]] = deque([(now_s, step)])

    def note(self, step: int, now_s: float) -> None:
        """The training has come to this step."""
        self._seen.append((now_s, step))
        while len(self._seen) > 2 and self._seen[1][0] < now_s - WINDOW_S:
            self._seen.popleft()

    @property
    def step_s(self) -> float | None:
        """Seconds that a step takes; None where none was seen yet."""
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last_s - first_s) / (last - first) if last > first else None
